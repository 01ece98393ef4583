"""A build's lock that outlived its process: found, removed where that is certain, and never waited for
without end. The locks are torch's own, taken by processes that are then killed."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rank_processes import process_environment
from torch.utils.file_baton import FileBaton

from sparse_llama.distributed import build_locks
from sparse_llama.distributed.build_locks import (
    LONGEST_BUILD_S,
    builds_folder,
    clear_stale_locks,
    find_locks,
    wait_for_builds,
)
from sparse_llama.errors import BuildError

# of torch's file_baton.py alone: importing torch takes 2 s
_BUILDER = """
import importlib.util, subprocess, sys, time
path = importlib.util.find_spec("torch").submodule_search_locations[0] + "/utils/file_baton.py"
spec = importlib.util.spec_from_file_location("file_baton", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.FileBaton(sys.argv[1] + "/lock").try_acquire()
child = subprocess.Popen(["sleep", "60"], cwd=sys.argv[1]) if sys.argv[2:] else None
print("taken", child.pid if child else 0, flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where ``cpu_adam`` is built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    made = tmp_path / "cpu_adam"
    made.mkdir()
    return made


@contextmanager
def building(folder: Path, *, has_ninja: bool = False) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Build in ``folder``: yield the process that holds torch's lock, and the one that it has compile."""
    command = [sys.executable, "-c", _BUILDER, str(folder), *(["ninja"] if has_ninja else [])]
    with subprocess.Popen(command, env=process_environment(), stdout=subprocess.PIPE, text=True) as process:
        child = 0
        try:
            assert process.stdout is not None
            child = int(process.stdout.readline().split()[1])
            yield process, child
        finally:
            kill(process)
            if child:
                end(child)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def end(process: int) -> None:
    """Kill a process that has lost its parent, and wait until it is gone."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
    deadline = time.monotonic() + 10
    while Path("/proc", str(process), "cwd").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def leave(folder: Path) -> Path:
    """Leave a lock as a build does that Linux kills."""
    with building(folder) as (process, _):
        kill(process)
    return folder / "lock"


def test_the_folder_is_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from torch.utils import cpp_extension

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (None, str(tmp_path / "own")):
        if name is None:
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        else:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", name)
        theirs = Path(cpp_extension._get_build_directory("cpu_adam", False))
        assert builds_folder() / "cpu_adam" == theirs


def test_a_lock_of_a_killed_build_is_stale_and_can_be_taken_again_once_removed(folder: Path):
    lock = leave(folder)
    assert not FileBaton(str(lock)).try_acquire()  # every start would wait for it
    (found,) = find_locks()
    assert (found.path, found.op, found.holders, found.is_stale) == (lock, "cpu_adam", (), True)
    assert clear_stale_locks(["cpu_lion"]) == []
    assert [one.path for one in clear_stale_locks()] == [lock]
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    baton.release()


def test_a_lock_that_a_process_holds_stays(folder: Path):
    with building(folder) as (process, _):
        (found,) = find_locks()
        assert (found.holders, found.is_stale) == ((process.pid,), False)
        assert clear_stale_locks() == []
        assert (folder / "lock").exists()


def test_a_lock_stays_while_the_killed_builds_compiler_goes_on(folder: Path):
    """ninja outlives who started it, and two of them in one folder write over each other."""
    with building(folder, has_ninja=True) as (process, ninja):
        kill(process)
        (found,) = find_locks()
        assert (found.holders, found.is_stale) == ((ninja,), False)
        assert clear_stale_locks() == []
        end(ninja)
        assert len(clear_stale_locks()) == 1


def test_who_needs_the_op_goes_on_at_once_and_says_what_was_removed(folder: Path, caplog):
    lock = leave(folder)
    with caplog.at_level(logging.WARNING):
        wait_for_builds(["cpu_adam"], limit_s=0)
    assert not lock.exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"note: {lock}: removed; a build of DeepSpeed's cpu_adam was killed under it"
    ]


def test_a_build_under_way_is_waited_for_in_bounds(folder: Path):
    with building(folder) as (process, _), pytest.raises(BuildError) as refused:
        wait_for_builds(["cpu_adam"], limit_s=0.3)
    said = str(refused.value)
    assert said.startswith(f"{folder / 'lock'}: DeepSpeed's cpu_adam has been locked for 0 s by a build")
    assert f"process {process.pid}" in said
    assert "\n" not in said


def test_a_lock_of_another_op_is_nobodys_business(folder: Path):
    with building(folder):
        wait_for_builds(["cpu_lion"], limit_s=0)


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"WORLD_SIZE": "4", "LOCAL_SIZE": "2"},  # as DeepSpeed's launcher has it
        {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},  # as torchrun has it
    ],
)
def test_a_job_of_two_hosts_removes_nothing(folder: Path, monkeypatch, elsewhere: dict[str, str]):
    lock = leave(folder)
    for name, value in elsewhere.items():
        monkeypatch.setenv(name, value)
    assert clear_stale_locks() == []
    with pytest.raises(BuildError, match="by no process that can be seen from here; if nothing builds it"):
        wait_for_builds(["cpu_adam"], limit_s=0)
    assert lock.exists()


@pytest.mark.parametrize("kind", ["nfs4", "9p", "fuse.sshfs", None])
def test_on_a_shared_drive_only_a_lock_older_than_any_build_is_removed(folder: Path, monkeypatch, kind):
    lock = leave(folder)
    monkeypatch.setattr(build_locks, "_filesystem", lambda path: kind)
    assert clear_stale_locks() == []
    old = time.time() - LONGEST_BUILD_S - 60
    os.utime(lock, (old, old))
    assert len(clear_stale_locks()) == 1


def test_the_file_system_is_linuxs_answer(tmp_path: Path):
    """By ``stat -f``, which asks the kernel where this reads a table; it calls ext4 by its family."""
    for path in (tmp_path, Path("/proc"), Path("/dev/shm")):
        done = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True)
        theirs = {"ext2/ext3": "ext4", "overlayfs": "overlay"}.get(done.stdout.strip(), done.stdout.strip())
        assert build_locks._filesystem(path) == theirs


def test_other_ranks_wait_for_the_first_to_clear(folder: Path, monkeypatch):
    """A rank that loaded meanwhile would open a library that was never finished."""
    leave(folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(BuildError):
        wait_for_builds(["cpu_adam"], limit_s=0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    wait_for_builds(["cpu_adam"], limit_s=0)


_JOIN = """
from sparse_llama.distributed import ranks
ranks.initialize()
ranks.finalize()
print("joined")
"""


@pytest.mark.faults
def test_a_start_after_a_killed_build_joins_its_group(tmp_path: Path, monkeypatch):
    """The whole of it: torch's lock, left in a copy of the real folder, and DeepSpeed's own start."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    built, copy = builds_folder(), tmp_path / "builds"
    if built.is_dir():
        shutil.copytree(built, copy)
    folder = copy / build_locks.SHARED_MEMORY_OP
    folder.mkdir(parents=True, exist_ok=True)
    lock = leave(folder)
    done = subprocess.run(
        [sys.executable, "-c", _JOIN],
        env=process_environment(TORCH_EXTENSIONS_DIR=str(copy), DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("joined\n")
    assert f"note: {lock}: removed" in done.stderr
    assert not lock.exists()
