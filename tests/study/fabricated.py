"""A study's folder with runs that a test made up, so that every number of a report is known."""

import json
from pathlib import Path
from typing import Any

from sparse_llama.study.runs import Study, StudyRun
from sparse_llama.study.settings import StudySettings

BLOCK: dict[str, Any] = {
    "variants": {"dense": {"changes": {"sparse_attention": None}}, "sparse": {}},
    "lengths": [128],
    "seeds": [1, 2, 3],
    "compare": ["equal_steps", "equal_time"],
    "evaluation": {
        "records": 4,
        "texts": ["wikitext2", "mine.txt"],
        "prompts": ["Who | what?"],
        "retrieval": {"trials": 2},
    },
}


def fabricate(folder: Path, **block: Any) -> Study:
    """Return a study of ``BLOCK`` with its documents written."""
    study = Study("mine", StudySettings.parse(BLOCK | block), folder, folder / "out")
    study.check()
    return study


def summary(**own: Any) -> dict[str, Any]:
    """Return a run's summary."""
    return {
        "trainable_parameters": 1000,
        "density": 1.0,
        "train_loss": 2.0,
        "validation_loss_before": 3.0,
        "validation_loss": 1.5,
        "steps": 10,
        "elapsed_s": 60.0,
        "tokens_per_s": 100.0,
        "peak_memory_bytes": {"gpu": 0, "host": 2**30},
        "device": "a calculator",
        "versions": {"torch": "9.9"},
    } | own


def measured(exact_match: float, perplexity: float | str, answer: str) -> dict[str, Any]:
    """Return what a model was measured at."""
    text = {"error": perplexity} if isinstance(perplexity, str) else _text(perplexity)
    scores = {"average": exact_match, "by_category": {"qa": exact_match}, "records": 4}
    overlap = {"average": 0.75, "by_category": {"qa": 0.75}, "records": 4}
    cells = [
        {
            "length": length,
            "depth": depth,
            "num_trials": 2,
            "exact": exact_match,
            "loss": depth + length / 100,
        }
        for length in (64, 128)
        for depth in (0.0, 1.0)
    ]
    return {
        "texts": {"wikitext2": text, "mine.txt": _text(7.0)},
        "records": {"exact_match": scores, "rouge_l": overlap} | _text(3.0),
        "answers": {"Who | what?": answer},
        "retrieval": {"exact": exact_match, "loss": 1.0, "cells": cells},
    }


def _text(perplexity: float) -> dict[str, Any]:
    ranges = [
        {"first": 1 + 64 * part, "last": 64 * (part + 1), "perplexity": perplexity} for part in range(2)
    ]
    return {"perplexity": perplexity, "by_position": ranges}


def leave(
    study: Study,
    run: StudyRun,
    *,
    status: str = "done",
    reason: str = "",
    summary: dict[str, Any] | None = None,
    measured: dict[str, Any] | None = None,
    losses: list[float] | None = None,
) -> None:
    """Write what a run leaves in its folder."""
    folder = study.folder_of(run)
    folder.mkdir(parents=True)
    outcome = {"status": status, "reason": reason, "command": f"deepspeed {run.name}"}
    for name, content in (("outcome", outcome), ("summary", summary), ("measured", measured)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses or [], start=1)]
    for name in ("metrics", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
