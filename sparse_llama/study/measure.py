"""The measurements of one model of a study, as a process: it is opened once for all of them.

Every number is what ``launch/evaluate.py`` gives for the same model and data.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_llama.data.prompt import alpaca_prompt
from sparse_llama.distributed import ranks
from sparse_llama.errors import SparseLlamaError
from sparse_llama.evaluation.evaluate import evaluate, to_json
from sparse_llama.generation import generate_batch
from sparse_llama.model.assemble import OpenedModel, open_model
from sparse_llama.study.settings import EvaluationSettings
from sparse_llama.training.metrics import write_json

RESULT = "measured.json"


@dataclass(frozen=True)
class Order:
    """What is measured, and on what."""

    model: str
    adapter: str | None
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
    )
    asked = order.evaluation
    return {
        "texts": {name: _text(opened, name, order.window) for name in asked.texts},
        "records": _records(opened, order) if asked.records else None,
        "answers": _answers(opened, asked),
    }


def _text(opened: OpenedModel, name: str, window: int) -> dict[str, Any]:
    """Return the perplexity of a text, or why there is none: a corpus that cannot be had must not cost the
    others."""
    try:
        return to_json(evaluate(opened, name, window=window))
    except SparseLlamaError as error:
        return {"error": str(error)}


def _records(opened: OpenedModel, order: Order) -> dict[str, Any]:
    asked = order.evaluation
    return to_json(
        evaluate(
            opened,
            order.dataset,
            window=order.window,
            num_answers=asked.records,
            max_new_tokens=asked.max_new_tokens,
        )
    )


def _answers(opened: OpenedModel, asked: EvaluationSettings) -> dict[str, str]:
    prompts = [alpaca_prompt(prompt) for prompt in asked.prompts]
    answers = generate_batch(opened.model, opened.tokenizer, prompts, asked.max_new_tokens) if prompts else []
    return dict(zip(asked.prompts, answers, strict=True))


def main() -> None:
    """Measure what the file on the command line says, and write the figures beside it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("order", type=Path)
    order = Order.read(parser.parse_args().order)
    ranks.initialize()
    write_json(order.folder / RESULT, measure(order))
    ranks.finalize()


if __name__ == "__main__":
    main()
