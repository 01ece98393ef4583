"""Memory that really runs out, under a limit of the process: what a user reads, and a run that goes on."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_processes import process_environment
from small_runs import losses

from sparse_llama import cli
from sparse_llama.cli import out_of_memory, training
from sparse_llama.config.bundled import DATASETS
from sparse_llama.config.run import Overrides, Run, load_run
from sparse_llama.errors import ConfigError, OutOfMemoryError
from sparse_llama.planning.advice import Advice, corrected
from sparse_llama.planning.estimate import Estimate, Traffic
from sparse_llama.planning.hardware import GIB, GPU_RESERVE_BYTES, Hardware
from sparse_llama.planning.quick import Change, Refusal
from sparse_llama.training.loop import fit
from sparse_llama.training.out_of_memory import FailedBatch, RunOutOfMemoryError, Shortage
from sparse_llama.training.retries import read_retries

ROOT = Path(__file__).parents[2]
MIB = 2**20
LIMITED = "tests/launch/limited_train.py"


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of rows of 2,048 tokens, four at a time, on the bundled model."""
    folder = tmp_path_factory.mktemp("long")
    people = DATASETS["bundled:people"]
    shutil.copyfile(people / "train.jsonl", folder / "train.jsonl")
    held_out = (people / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "validation.jsonl").write_text("".join(held_out[:4]), encoding="utf-8")
    document = json.loads((ROOT / "ds_configs" / "cpu_demo.json").read_text(encoding="utf-8"))
    document["tensorboard"] = {"enabled": False}
    document["sparse_llama"] |= {
        "seq_length": 2048,
        "data": {"dataset": str(folder)},
        "training": {"steps": 2, "samples": 0},
    }
    path = folder / "long.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def start_limited(extra_mib: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run ``launch/train.py`` where it may have so many MiB beyond its libraries."""
    return subprocess.run(
        [sys.executable, LIMITED, str(extra_mib), *flags],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_memory_that_runs_out_ends_in_a_few_lines_and_status_3(long_rows: Path, tmp_path: Path):
    flags = ["--ds_config", str(long_rows), "--output_dir", str(tmp_path / "run"), "--ignore_plan"]
    done = start_limited(150, *flags)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    said = done.stderr[done.stderr.index("error: out of memory") :]
    for part in (
        "MiB more asked for on the host",
        "forward pass of step 1, in model.layers.",
        "4 rows of 2,048 tokens;",
        "labelled tokens",
        "checkpoint   none yet",
        "planned        held",
        "activations and the rest",
        "RLIMIT_DATA",
        "would fit, smallest change first:",
    ):
        assert part in said, part
    assert max(map(len, said.splitlines())) <= 110
    assert said.index("--micro_batch_size") < said.index("--seq_length"), (
        "a shorter context is the last resort"
    )


@pytest.mark.slow
def test_a_retried_run_reaches_its_end_as_one_that_had_the_settings_from_the_start(
    long_rows: Path, tmp_path: Path
):
    flags = ["--ds_config", str(long_rows), "--ignore_plan"]
    done = start_limited(200, *flags, "--on_oom", "retry", "--output_dir", str(tmp_path / "retried"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "retry 1: --" in done.stderr
    summary = json.loads((tmp_path / "retried" / "summary.json").read_text(encoding="utf-8"))
    retries = summary["retries"]
    assert 1 <= len(retries) <= out_of_memory.MOST_RETRIES
    assert summary["seq_length"] == 2048
    record = json.loads((tmp_path / "retried" / "run.json").read_text(encoding="utf-8"))
    assert record["retries"] == retries
    pulled = [word for retry in retries for word in retry["flags"]]
    parser = cli.train_parser(None)
    given = cli.overrides(parser.parse_args([*flags, *pulled, "--output_dir", str(tmp_path / "anew")]))
    fit(load_run(long_rows, given, 1))
    assert losses(tmp_path / "retried") == pytest.approx(losses(tmp_path / "anew"), rel=1e-6)


@pytest.mark.slow
def test_two_processes_end_in_one_message(long_rows: Path, tmp_path: Path, free_port: int):
    """The other rank waits in a collective, and the launcher ends it."""
    launcher = Path(sys.executable).with_name("deepspeed")
    flags = ["--ds_config", str(long_rows), "--output_dir", str(tmp_path / "run"), "--ignore_plan"]
    command = [sys.executable, str(launcher), "--master_port", str(free_port), "--num_gpus", "2"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -Sd 600000; exec "$@"', "bash", *command, "launch/train.py", *flags],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 3
    assert (done.stdout + done.stderr).count("error: out of memory") == 1
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--seed", "1", "--overwrite"], ["--seed", "1"]),
        (["--resume", "--seed", "1"], ["--seed", "1"]),
        (["--resume", "runs/a/checkpoints/step_000001", "--seed", "1"], ["--seed", "1"]),
        (["--resume=runs/a", "--retry", "3", "--local_rank=0"], ["--local_rank=0"]),
    ],
)
def test_where_a_run_begins_is_left_out_of_its_command_line(words: list[str], kept: list[str]):
    assert out_of_memory.again(words) == kept


SHORTAGE = Shortage(
    place="host",
    message="can't allocate memory",
    asked_bytes=64 * MIB,
    held={"weights": 6 * MIB, "activations and the rest": 500 * MIB, "libraries": 400 * MIB},
    limit_bytes=950 * MIB,
    limit_name="RLIMIT_DATA, see ulimit -d",
    phase="backward pass",
    module=None,
    step=4,
    batch=FailedBatch(4, 2048, 9, 700, 5000),
)
PLANNED = Estimate(
    peak_bytes={"host": 1000 * MIB},
    components={"host": {"libraries": 500 * MIB, "weights": 6 * MIB, "activations": 494 * MIB}},
    alive=(),
    phase="loss",
    saved_bytes_per_token_and_layer=0.0,
    traffic_bytes=Traffic(),
    flops=0.0,
)
SHORTER = Change("a shorter context", {}, ("--seq_length", "64"), {}, {}, is_same_run=False)
TILED = Change("a tile of logits at a time", {}, ("--loss_tile", "256"), {}, {"host": 90 * MIB})


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[list[str]]]:
    """Return a function that makes a run fail, with changes proposed, and returns the command lines that it
    starts again with."""

    def start(
        changes: tuple[Change, ...],
        *flags: str,
        shortage: Shortage = SHORTAGE,
        advise: Callable[..., Advice] | None = None,
    ) -> list[list[str]]:
        started: list[list[str]] = []

        def fail(*_: Any, **__: Any) -> None:
            raise RunOutOfMemoryError(shortage)

        def note(_: str, words: list[str]) -> None:
            started.append(words)
            raise SystemExit(0)  # execv does not return

        monkeypatch.setattr("sparse_llama.training.loop.fit", fail)
        advise = advise or (lambda *_: Advice(PLANNED, changes))
        monkeypatch.setattr("sparse_llama.planning.advice.advise_apart", advise)
        monkeypatch.setattr(os, "execv", note)
        monkeypatch.setattr(os, "closerange", lambda *_: None)
        words = ["--output_dir", str(tmp_path / "run"), *flags]
        monkeypatch.setattr(sys, "argv", ["launch/train.py", *words])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "launch/train.py", *words])
        with contextlib.suppress(SystemExit):
            training.train(cli.train_parser(None).parse_args(words))
        return started

    return start


def test_a_retry_is_the_same_command_with_the_first_change_from_the_newest_checkpoint(
    failing: Callable[..., list[list[str]]], tmp_path: Path
):
    saved = replace(SHORTAGE, checkpoint=tmp_path / "step_000003", is_saved_now=True)
    (words,) = failing((TILED, SHORTER), "--on_oom", "retry", "--overwrite", shortage=saved)
    given = ["--output_dir", str(tmp_path / "run"), "--on_oom", "retry", "--loss_tile", "256"]
    new = ["--retry", "1", "--resume", str(tmp_path / "step_000003")]
    assert words == [sys.executable, "-u", "launch/train.py", *given, *new]
    (retry,) = read_retries(tmp_path / "run")
    assert retry["flags"] == ["--loss_tile", "256"]
    assert retry["out_of_memory"]["step"] == 4


def test_a_retry_without_a_checkpoint_begins_anew(failing: Callable[..., list[list[str]]], tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}", encoding="utf-8")
    (words,) = failing((TILED,), "--on_oom", "retry", "--overwrite", "--retry", "2")
    assert words[-3:] == ["--retry", "3", "--overwrite"]
    assert words.count("--overwrite") == 1


@pytest.mark.parametrize(
    ("changes", "flags", "reason"),
    [
        ((SHORTER,), (), "no setting that leaves the run what it is would fit"),
        ((), (), "no setting makes this run fit"),
        ((TILED,), ("--retry", "8"), "8 times is enough"),
    ],
)
def test_a_context_is_never_shortened_nor_a_run_started_for_ever(
    failing: Callable[..., list[list[str]]], changes: tuple[Change, ...], flags: tuple[str, ...], reason: str
):
    with pytest.raises(OutOfMemoryError, match=reason):
        failing(changes, "--on_oom", "retry", *flags)


def test_without_retry_nothing_is_started(failing: Callable[..., list[list[str]]], tmp_path: Path):
    with pytest.raises(OutOfMemoryError) as found:
        failing((TILED, SHORTER))
    said = str(found.value)
    assert said.index("--loss_tile 256   saves 90.0 MiB") < said.index("--seq_length 64")
    assert "--resume" not in said
    assert not (tmp_path / "run" / "retries.json").exists()


def test_a_plan_that_fails_does_not_hide_the_shortage(failing: Callable[..., list[list[str]]]):
    def fail(*_: Any) -> Advice:
        raise SystemError("error return without exception set")

    with pytest.raises(OutOfMemoryError, match="could not be worked out: SystemError") as found:
        failing((), advise=fail)
    assert "64.0 MiB more asked for" in str(found.value)


def test_several_processes_are_not_retried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--on_oom", "retry", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match=r"--on_oom retry: is for one process, this job has 2"):
        training.train(cli.train_parser(None).parse_args(flags))


def demo() -> Run:
    return load_run(None, Overrides(), 1, is_main=False)


def test_a_budget_is_corrected_by_what_the_run_took_more_than_planned():
    """64 of 564 MiB were missing where 500 were planned; libraries are in neither."""
    here = Hardware(gpu_bytes=None, host_bytes=100 * GIB)
    left = corrected(here, demo(), 6, SHORTAGE, PLANNED)
    needed, limit = 6 + 500 + 64, 950 - 400
    assert left.host_bytes / MIB == pytest.approx(500 + limit / (needed / 500), abs=0.01)
    assert left.host_bytes < PLANNED.peak_bytes["host"]


def test_a_run_that_failed_half_way_needs_more_than_it_held():
    """In the third of six layers half of what a forward pass keeps is there."""
    early = replace(SHORTAGE, phase="forward pass", module="model.layers.2.mlp")
    here = Hardware(gpu_bytes=None, host_bytes=100 * GIB)
    left = corrected(here, demo(), 6, early, PLANNED)
    assert left.host_bytes / MIB == pytest.approx(500 + 550 / (570 / 250), abs=0.01)
    checkpointed = load_run(None, Overrides(checkpointing="gpu"), 1, is_main=False)
    assert corrected(here, checkpointed, 6, early, PLANNED) == corrected(here, demo(), 6, SHORTAGE, PLANNED)


def test_a_gpus_budget_keeps_its_reserve():
    held = {"weights": 13 * GIB, "activations and the rest": 24 * GIB, "CUDA's own, and other processes": GIB}
    shortage = replace(SHORTAGE, place="gpu", held=held, asked_bytes=4 * GIB, limit_bytes=40 * GIB)
    planned = Estimate({"gpu": 38 * GIB, "host": GIB}, {"gpu": {}, "host": {}}, (), "", 0.0, Traffic(), 0.0)
    left = corrected(Hardware(40 * GIB, 100 * GIB), demo(), 32, shortage, planned)
    assert left.gpu_bytes is not None
    usable = left.gpu_bytes - GPU_RESERVE_BYTES
    assert usable / GIB == pytest.approx((40 - 1.5) / ((42 - 1.5) / 38), abs=0.01)


def test_what_cannot_fit_is_refused_before_the_model_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    refusal = Refusal("host", 3 * GIB, 2 * GIB, PLANNED, (TILED,))
    monkeypatch.setattr("sparse_llama.planning.quick.check_fits", lambda *_: refusal)
    started: list[Run] = []
    monkeypatch.setattr("sparse_llama.training.loop.fit", lambda *run, **_: started.append(*run))
    with pytest.raises(SystemExit) as ended:
        cli.main(cli.train, cli.train_parser("doc"), ["--output_dir", str(tmp_path / "run")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--loss_tile 256" in said
    assert "--ignore_plan" in said
    assert not started
    cli.main(cli.train, cli.train_parser("doc"), ["--output_dir", str(tmp_path / "run"), "--ignore_plan"])
    assert len(started) == 1
