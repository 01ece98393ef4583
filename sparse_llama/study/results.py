"""What a study has found so far, read from its folder: nothing of a report is anywhere else."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_llama.study.measure import RESULT
from sparse_llama.study.runner import MEASURED, Outcome, read_outcome
from sparse_llama.study.runs import Study, StudyRun
from sparse_llama.training.metrics import read_step_lines

Curve = list[tuple[int, float]]
"""Step and value."""


@dataclass(frozen=True)
class Result:
    """What one run has left in its folder."""

    run: StudyRun
    folder: Path
    outcome: Outcome | None
    """None where it has not ended."""
    summary: dict[str, Any] | None
    measured: dict[str, Any] | None
    measuring: Outcome | None = None
    """What came of measuring it; None where that has not ended."""

    @property
    def peak_bytes(self) -> int | None:
        """The most that training had: of the GPU where there is one, else of the process."""
        if self.summary is None:
            return None
        peaks = self.summary["peak_memory_bytes"]
        return peaks["gpu"] or peaks["host"]

    def train_curve(self) -> Curve:
        """Return the loss of every step."""
        return [(line["step"], line["loss"]) for line in read_step_lines(self.folder / "metrics.jsonl")]

    def validation_curve(self) -> Curve:
        """Return the loss of every validation, that before the first step included."""
        return [(line["step"], line["loss"]) for line in read_step_lines(self.folder / "validation.jsonl")]


@dataclass(frozen=True)
class Results:
    """Every run of a study, and the base at each length."""

    study: Study
    runs: tuple[Result, ...]
    bases: dict[int, dict[str, Any]]
    """What the base was measured at, by length."""

    def of(self, variant: str, seq_length: int, compare: str) -> list[Result]:
        """Return the runs of a variant at a length, one for each seed."""
        return [
            one
            for one in self.runs
            if (one.run.variant, one.run.seq_length, one.run.compare) == (variant, seq_length, compare)
        ]


def read_results(study: Study) -> Results:
    """Return what is in the study's folder."""
    runs = tuple(_read(study, run) for run in study.all_runs())
    bases = {
        length: found
        for length in study.settings.lengths
        if (found := _json(study.base_folder(length) / RESULT)) is not None
    }
    return Results(study, runs, bases)


def _read(study: Study, run: StudyRun) -> Result:
    folder = study.folder_of(run)
    outcome = read_outcome(folder)
    measuring = read_outcome(folder, MEASURED)
    return Result(run, folder, outcome, _json(folder / "summary.json"), _json(folder / RESULT), measuring)


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
