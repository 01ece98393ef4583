"""The measurements of one model of a study, as a process: it is opened once for all of them.

Every number is what ``launch/evaluate.py`` gives for the same model and data.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_llama.config.settings import TemplateName
from sparse_llama.data.template import write_prompt
from sparse_llama.distributed import ranks
from sparse_llama.errors import SparseLlamaError
from sparse_llama.evaluation.answers import write_answers
from sparse_llama.evaluation.evaluate import evaluate
from sparse_llama.evaluation.report import positions_to_json, to_json
from sparse_llama.evaluation.retrieval import retrieve
from sparse_llama.evaluation.score import by_position
from sparse_llama.generation import generate_batch
from sparse_llama.model.assemble import OpenedModel, open_model
from sparse_llama.study.settings import EvaluationSettings, RetrievalSettings
from sparse_llama.training.metrics import write_json

RESULT, ANSWERS = "measured.json", "answers.jsonl"
NUM_RANGES = 8
"""Of positions, equally long, that a loss is told by."""


@dataclass(frozen=True)
class Order:
    """What is measured, and on what."""

    model: str
    adapter: str | None
    template: TemplateName
    window: int
    dataset: str
    evaluation: EvaluationSettings
    folder: Path

    @classmethod
    def read(cls, file: Path) -> "Order":
        """Return the order in a file; the results go beside it."""
        content = json.loads(file.read_text(encoding="utf-8"))
        evaluation = EvaluationSettings.parse(content.pop("evaluation"))
        return cls(**content, evaluation=evaluation, folder=file.parent)


def measure(order: Order) -> dict[str, Any]:
    """Return every figure that is asked for, by name."""
    opened = open_model(
        order.model,
        None if order.adapter is None else Path(order.adapter),
        device=ranks.device(),
        template=order.template,
    )
    asked = order.evaluation
    return {
        "texts": {name: _text(opened, name, order.window) for name in asked.texts},
        "records": _records(opened, order) if asked.records else None,
        "answers": _answers(opened, asked),
        "retrieval": None if asked.retrieval is None else _retrieval(opened, order, asked.retrieval),
    }


def _text(opened: OpenedModel, name: str, window: int) -> dict[str, Any]:
    """Return the perplexity of a text, in whole and by position, or why there is none: a corpus that cannot
    be had must not cost the others."""
    try:
        result = evaluate(opened, name, window=window)
    except SparseLlamaError as error:
        return {"error": str(error)}
    return to_json(result) | {"by_position": positions_to_json(by_position(result.score, NUM_RANGES))}


def _records(opened: OpenedModel, order: Order) -> dict[str, Any]:
    asked = order.evaluation
    result = evaluate(
        opened,
        order.dataset,
        window=order.window,
        num_answers=asked.records,
        max_new_tokens=asked.max_new_tokens,
    )
    write_answers(order.folder / ANSWERS, result.answers)
    return to_json(result) | {"by_position": positions_to_json(by_position(result.score, NUM_RANGES))}


def _retrieval(opened: OpenedModel, order: Order, asked: RetrievalSettings) -> dict[str, Any]:
    """Return what is found, by length and depth, in the same texts for every model of the study; or why
    nothing was looked for, such as a length that is too short."""
    try:
        found = retrieve(
            opened,
            asked.kind,
            lengths=asked.lengths or None,
            num_depths=asked.depths,
            trials=asked.trials,
        )
    except SparseLlamaError as error:
        return {"error": str(error)}
    return {
        "exact": found.exact,
        "loss": found.loss,
        "cells": [asdict(cell) for cell in found.cells],
    }


def _answers(opened: OpenedModel, asked: EvaluationSettings) -> dict[str, str]:
    if not asked.prompts:
        return {}
    prompts = [write_prompt(opened.templated, prompt) for prompt in asked.prompts]
    answers = generate_batch(opened.model, opened.templated, prompts, asked.max_new_tokens)
    return dict(zip(asked.prompts, answers, strict=True))


def main() -> None:
    """Measure what the file on the command line says, and write the figures beside it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("order", type=Path)
    order = Order.read(parser.parse_args().order)
    ranks.initialize()
    try:
        write_json(order.folder / RESULT, measure(order))
    except SparseLlamaError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(error.exit_status) from None
    finally:
        ranks.finalize()


if __name__ == "__main__":
    main()
