"""Jobs under the real launcher: a rank that dies takes the job down with a message, a signal saves, ranks
that differ are told before they train."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_table import FaultsRecord
from faults.nursery import wait_for
from rank_processes import process_environment
from small_runs import losses
from training.conftest import write_configuration

from sparse_llama.distributed.ranks import free_port
from sparse_llama.training.checkpoint import list_checkpoints, newest_intact

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
BOUND_S = 60
"""In which a job must be down: the launcher looks every second, and gives the others 30 s."""
LONG: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "sparse_llama": {"training": {"steps": 5_000, "samples": 0, "save_every": 10}},
}


class Job:
    """One under ``deepspeed``, from its start to its end."""

    def __init__(
        self, document: Path, output_dir: Path, ranks: int, *words: str, script: str = "launch/train.py"
    ) -> None:
        self.output_dir = output_dir
        launcher = Path(sys.executable).with_name("deepspeed")
        flags = ["--master_port", str(free_port()), "--num_gpus", str(ranks), script]
        run = ["--ds_config", str(document), "--output_dir", str(output_dir), "--ignore_plan", *words]
        self._log = output_dir.with_suffix(".log").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, str(launcher), *flags, *run],
            cwd=ROOT,
            env=process_environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks, by rank."""
        found: dict[int, psutil.Process] = {}
        for one in psutil.Process(self.process.pid).children(recursive=True):
            words = " ".join(one.cmdline())
            number = re.search(r"--local_rank=(\d+)", words)
            if number is not None and "deepspeed.launcher" not in words:
                found[int(number[1])] = one
        return [found[number] for number in sorted(found)]

    def trains(self) -> bool:
        return bool(list_checkpoints(self.output_dir / "checkpoints"))

    def printed(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        job.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_takes_the_job_down_with_a_message(
    rank: int, workplace: Path, tmp_path: Path, jobs: list[Job], faults_record: FaultsRecord
):
    job = Job(write_configuration(workplace, tmp_path, LONG), tmp_path / "run", 2, "--zero_stage", "2")
    jobs.append(job)
    assert wait_for(job.trains, 120), job.printed()
    killed_s = time.monotonic()
    job.ranks()[rank].send_signal(signal.SIGKILL)
    job.process.wait(BOUND_S)
    print(f"down after {time.monotonic() - killed_s:.1f} s")
    assert job.process.returncode != 0
    printed = job.printed()
    assert f"error: rank {1 - rank}: another rank has ended" in printed, printed[-3000:]
    assert re.search(r"the newest checkpoint is \S+/step_\d{6}, --resume goes on from it", printed)
    assert "Traceback" not in printed
    assert newest_intact(job.output_dir / "checkpoints") is not None
    faults_record("a rank killed", injected=1, survived=1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_the_launcher_saves_every_finished_step(
    ranks: int, workplace: Path, tmp_path: Path, jobs: list[Job], faults_record: FaultsRecord
):
    """As a scheduler sends it, to the launcher's process that started the ranks."""
    document = write_configuration(workplace, tmp_path, LONG)
    job = Job(document, tmp_path / "run", ranks)
    jobs.append(job)
    assert wait_for(job.trains, 120), job.printed()
    launcher = job.ranks()[0].parent()
    assert launcher is not None
    launcher.send_signal(signal.SIGTERM)
    job.process.wait(BOUND_S)
    printed = job.printed()
    saved = re.search(r"stopped: SIGTERM: after step (\d+), \S+/step_(\d+) is saved", printed)
    assert saved is not None, printed[-3000:]
    assert "Traceback" not in printed
    steps = len(losses(job.output_dir))
    assert int(saved[1]) == int(saved[2]) == steps
    newest = newest_intact(job.output_dir / "checkpoints")
    assert newest is not None
    assert newest.name == f"step_{steps:06d}"
    faults_record("SIGTERM to the launcher", injected=1, survived=1)


def test_ctrl_c_in_a_terminal_saves_every_finished_step(
    workplace: Path, tmp_path: Path, jobs: list[Job], faults_record: FaultsRecord
):
    """It reaches every process of the job at once, and then again as the launcher's SIGTERM."""
    job = Job(write_configuration(workplace, tmp_path, LONG), tmp_path / "run", 2)
    jobs.append(job)
    assert wait_for(job.trains, 120), job.printed()
    ranks = job.ranks()
    os.killpg(job.process.pid, signal.SIGINT)
    psutil.wait_procs(ranks, BOUND_S)
    job.process.wait(BOUND_S)
    printed = job.printed()
    assert re.search(r"stopped: SIGINT: after step \d+, \S+ is saved", printed), printed[-3000:]
    newest = newest_intact(job.output_dir / "checkpoints")
    assert newest is not None
    assert newest.name == f"step_{len(losses(job.output_dir)):06d}"
    faults_record("Ctrl-C", injected=1, survived=1)


@pytest.mark.parametrize("what", ["configuration", "data"])
def test_ranks_that_differ_are_told_before_they_train(
    what: str, workplace: Path, tmp_path: Path, jobs: list[Job], faults_record: FaultsRecord
):
    """A file that was not copied to every host. Without a word such a job trains nobody's configuration."""
    document = write_configuration(workplace, tmp_path, LONG)
    content = json.loads(document.read_text(encoding="utf-8"))
    if what == "configuration":
        content["optimizer"]["params"]["lr"] *= 2
    else:  # the same path, another file behind it
        content["sparse_llama"]["data"]["cache"] = False
        document.write_text(json.dumps(content), encoding="utf-8")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content), encoding="utf-8")
    words = ["--other", str(other) if what == "configuration" else "data"]
    job = Job(document, tmp_path / "run", 2, *words, script="tests/faults/differing_train.py")
    jobs.append(job)
    job.process.wait(BOUND_S)
    printed = job.printed()
    assert job.process.returncode == 2, printed[-3000:]
    said = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert said[0].startswith(f"error: {what}: rank 1 and rank 0 differ; start all with the same file")
    assert not job.trains()
    faults_record("ranks that differ", injected=1, survived=1)
