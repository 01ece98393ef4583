"""Runs of a study one after the other, each a job of its own under DeepSpeed's launcher; what ends one is a
result.

A run that is done, or ran out of memory, is not run again; one that was stopped goes on from its newest
checkpoint, or begins anew.
"""

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sparse_llama.distributed.ranks import environment_without_job
from sparse_llama.planning.probe import launcher_command
from sparse_llama.study.runs import Study, StudyRun
from sparse_llama.training.checkpoint import newest_intact
from sparse_llama.training.metrics import write_json

DONE, OUT_OF_MEMORY, REFUSED, CRASHED = "done", "out of memory", "refused", "crashed"
Status = Literal["done", "out of memory", "refused", "crashed"]
_STATUS: dict[int, Status] = {0: DONE, 2: REFUSED, 3: OUT_OF_MEMORY}
"""By the exit status of a command."""
TRAINED, MEASURED = "outcome.json", "measure_outcome.json"
_MEASURE = "sparse_llama.study.measure"
_POLL_S = 0.25
_STOP_WITHIN_S = 30


@dataclass(frozen=True)
class Outcome:
    """What came of a job."""

    status: Status
    reason: str = ""
    """The error's own words; empty where all went well."""
    command: str = ""
    """That repeats it."""

    @property
    def is_final(self) -> bool:
        """Whether to leave it at that: memory that ran out is a result, a crash may not happen again."""
        return self.status in (DONE, OUT_OF_MEMORY)


Watch = Callable[[], None]
"""Called several times a second while a job runs."""


def read_outcome(folder: Path, name: str = TRAINED) -> Outcome | None:
    """Return what came of a job in ``folder``, ``TRAINED`` or ``MEASURED``; None where it has not ended."""
    file = folder / name
    if not file.is_file():
        return None
    return Outcome(**json.loads(file.read_text(encoding="utf-8")))


def train(study: Study, run: StudyRun, scripts: Path, watch: Watch, *, steps: int | None = None) -> Outcome:
    """Return what comes of a training run, and leave it in the run's folder.

    Args:
        scripts: the folder of ``train.py``.
        steps: in place of the document's length.
    """
    folder, document = study.folder_of(run), study.write_document(run, steps)
    folder.mkdir(parents=True, exist_ok=True)
    words = [str(scripts / "train.py"), "--ds_config", str(document), "--output_dir", str(folder)]
    goes_on: list[str] = []
    if (folder / "run.json").is_file():
        goes_on = ["--resume"] if newest_intact(folder / "checkpoints") else ["--overwrite"]
    status = _run_job(study.num_ranks, [*words, *goes_on], folder / "train.log", watch)
    outcome = Outcome(
        _STATUS.get(status, CRASHED),
        "" if status == 0 else _reason(folder / "train.log", status),
        f"deepspeed launch/train.py --ds_config {document} --output_dir NEW_FOLDER",
    )
    write_json(folder / TRAINED, asdict(outcome))
    return outcome


def measure(folder: Path, order: Mapping[str, Any], watch: Watch) -> Outcome:
    """Return what comes of measuring a model as ``order`` says; the figures are in the folder's
    ``measured.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "order.json"
    write_json(file, dict(order))
    status = _run_job(1, ["--module", _MEASURE, str(file)], folder / "measure.log", watch)
    reason = "" if status == 0 else _reason(folder / "measure.log", status)
    outcome = Outcome(_STATUS.get(status, CRASHED), reason)
    write_json(folder / MEASURED, asdict(outcome))
    return outcome


def _run_job(num_ranks: int, words: list[str], log: Path, watch: Watch) -> int:
    """Return the exit status of a job of the launcher's; an interrupt ends the job first."""
    with log.open("a", encoding="utf-8") as output:
        job = subprocess.Popen(
            [*launcher_command(num_ranks), *words],
            env=environment_without_job(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while job.poll() is None:
                watch()
                time.sleep(_POLL_S)
        finally:
            if job.poll() is None:
                job.terminate()
                try:
                    job.wait(_STOP_WITHIN_S)
                except subprocess.TimeoutExpired:
                    job.kill()
    return job.returncode


def _reason(log: Path, status: int) -> str:
    """Return the error that a command has told, or its last words."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    own = [line for line in lines if line.strip() and not line.startswith("[20")]
    if told:
        return told[-1]
    return f"exit status {status}: {own[-1].strip() if own else 'no word'}; see {log}"
