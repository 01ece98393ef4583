"""DeepSpeed's ops: built, not to be built, failing, and locked by a build that is no more."""

from pathlib import Path

import pytest
from distributed.test_build_locks import building, leave

from sparse_llama.distributed import ops as distributed_ops
from sparse_llama.doctor import ops
from sparse_llama.doctor.ops import Op, check_compilers, check_locks, check_op
from sparse_llama.errors import BuildError

COMPILER_SAYS = """Error building extension 'cpu_adam': [1/3] c++ -MMD -MF cpu_adam.o.d -O3
FAILED: cpu_adam.o
/usr/include/x86_64-linux-gnu/omp.h:12:10: fatal error: bits/types.h: No such file or directory
compilation terminated.
ninja: build stopped: subcommand failed.
"""
ADAM = Op("cpu_adam", "Adam and AdamW with --offload cpu", is_loaded=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where ``cpu_adam`` is built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    made = tmp_path / "cpu_adam"
    made.mkdir()
    return made


def check(*, builds: bool = True, loads_all: bool = False, op: Op = ADAM, said: list[str] | None = None):
    return check_op(op, (said if said is not None else []).append, builds=builds, loads_all=loads_all)


def planted(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[str]:
    """Have builds end so; return the list of ops that were to be loaded."""
    loaded: list[str] = []

    class Builder:
        def load(self, verbose: bool):
            loaded.append("cpu_adam")
            if error is not None:
                raise error

        def is_compatible(self, verbose: bool) -> bool:
            return True

    monkeypatch.setattr(distributed_ops, "_builder", lambda name: Builder())
    return loaded


def test_a_build_is_announced_before_it_begins(folder: Path, monkeypatch):
    loaded, said = planted(monkeypatch, None), []
    row = check(said=said)
    assert row.status == "ok"
    assert loaded == ["cpu_adam"]
    assert said == ["compiling cpu_adam, once for this machine: a minute or several ..."]
    (folder / "cpu_adam.so").touch()
    assert check(said=said).found.endswith("built and loads")
    assert len(said) == 1


def test_a_build_that_fails_is_red_with_the_compilers_words(folder: Path, monkeypatch):
    planted(monkeypatch, RuntimeError(COMPILER_SAYS))
    row = check()
    assert row.status == "fail"
    assert "fatal error: bits/types.h: No such file or directory" in row.found


def test_nothing_is_built_where_nothing_is_to_be(folder: Path, monkeypatch):
    loaded = planted(monkeypatch, None)
    assert check(builds=False).found.endswith("not built yet, can be")
    rare = Op("cpu_lion", "Lion with --offload cpu", is_loaded=False)
    assert check(op=rare).status == "none"
    assert loaded == []
    assert check(op=rare, loads_all=True).status == "ok"
    assert loaded == ["cpu_adam"]


def test_a_left_lock_is_told_and_does_not_hang(folder: Path, monkeypatch):
    lock = leave(folder)
    (row,) = check_locks()
    assert (row.status, row.name) == ("warn", "cpu_adam's lock")
    assert f"rm {lock}" in row.advice
    loaded = planted(monkeypatch, None)
    assert check(builds=False).status == "none"
    assert lock.exists()  # looked at, and no more
    assert check().status == "ok"
    assert loaded == ["cpu_adam"]
    assert not lock.exists()


def test_a_build_under_way_is_told_and_not_waited_for(folder: Path, monkeypatch):
    loaded = planted(monkeypatch, None)
    with building(folder) as (process, _):
        (row,) = check_locks()
        assert f"process {process.pid}" in row.found
        assert check().status == "warn"
    assert loaded == []


def test_no_lock_is_a_green_row(folder: Path):
    (row,) = check_locks()
    assert row.status == "ok"


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(ops, "ask", lambda *command: None)
    rows = {row.name: row for row in check_compilers()}
    assert rows["C++ compiler"].status == rows["ninja"].status == "warn"
    assert "apt install g++" in rows["C++ compiler"].advice
    assert rows["ninja"].advice == "pip install ninja"


def test_a_run_that_needs_what_cannot_be_built_is_told_in_one_line(folder: Path, monkeypatch):
    planted(monkeypatch, RuntimeError(COMPILER_SAYS))
    with pytest.raises(BuildError) as refused:
        distributed_ops.load_op("cpu_adam")
    said = str(refused.value)
    assert "\n" not in said
    assert said.startswith("cpu_adam: this op of DeepSpeed's cannot be built here (RuntimeError: ")
    assert "launch/doctor.py" in said
