"""``launch/evaluate.py``: a model, data, and how it is measured."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_llama.cli.entry import is_main, world_size
from sparse_llama.cli.flags import Parser, add_model_flags, make_room_for, parser
from sparse_llama.cli.models import open_asked
from sparse_llama.cli.retrieval import add_retrieval_flags, check_retrieval_flags, measure_retrieval
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from sparse_llama.evaluation.evaluate import Evaluation
    from sparse_llama.evaluation.score import PositionRange

_RANGES = 8  # of positions: 256 tokens each of a window of 2,048


def evaluate_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/evaluate.py``: a model, data, and how it is measured."""
    flags = parser(doc)
    add_model_flags(flags)
    add = flags.add_argument
    add("--data", metavar="NAME|FILE", help="wikitext2, ptb, c4, a file, or bundled:people")
    add("--json", type=Path, metavar="FILE", help="write the result there too")
    add("--png", type=Path, metavar="FILE", help="draw what --by_position or --retrieval measures")
    text = flags.add_argument_group("text").add_argument
    text(
        "--partition",
        choices=("windows", "harness"),
        help="windows (default) at the stride; harness: lm-evaluation-harness's, document by document",
    )
    text("--window", type=int, metavar="W", help="tokens read at once (default: the model's length)")
    text("--stride", type=int, metavar="S", help="tokens between windows (default: the window)")
    text(
        "--by_position",
        type=int,
        nargs="?",
        const=_RANGES,
        metavar="N",
        help=f"also the perplexity by the position in the window, in N ranges (default: {_RANGES})",
    )
    records = flags.add_argument_group("records").add_argument
    records("--exact_match", type=int, default=0, metavar="N", help="also compare N answers to their records")
    records("--max_new_tokens", type=int, default=64, metavar="N", help="of an answer that is compared")
    records("--answers", type=Path, metavar="FILE", help="write these answers there, a JSON object a line")
    add_retrieval_flags(flags)
    return flags


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure a model: tables, and a JSON file, a picture and answers where they are asked for."""
    _check(arguments)
    if is_main():
        _make_room(arguments)
    from sparse_llama.distributed import ranks

    if world_size() > 1:
        ranks.initialize()
    try:
        if arguments.retrieval is None:
            _measure(arguments)
        else:
            found = measure_retrieval(arguments, open_asked(arguments))
            if found is not None and arguments.json is not None:
                _write_json(arguments, found)
    finally:
        if world_size() > 1:
            ranks.finalize()


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that are missing, or that would have no effect."""
    check_retrieval_flags(arguments)
    if arguments.data is None and arguments.retrieval is None:
        raise ConfigError("--data: nothing to measure on; give wikitext2, ptb, c4, a file, or bundled:people")
    if arguments.by_position is not None and arguments.by_position < 1:
        raise ConfigError(f"--by_position: must be at least 1 range, got {arguments.by_position}")
    if arguments.png is not None and arguments.by_position is None and arguments.retrieval is None:
        raise ConfigError("--png: there is nothing to draw; add --by_position or --retrieval")
    if arguments.answers is not None and not arguments.exact_match:
        raise ConfigError("--answers: no record is answered; say how many with --exact_match N")


def _make_room(arguments: argparse.Namespace) -> None:
    """Say now, not after minutes of work, that a file cannot be written."""
    for flag in ("json", "png", "answers"):
        file = getattr(arguments, flag)
        if file is not None:
            make_room_for(f"--{flag}", file)
    if arguments.answers is not None:
        from sparse_llama.evaluation.answers import check_answers_file

        check_answers_file("--answers", arguments.answers)


def _measure(arguments: argparse.Namespace) -> None:
    from sparse_llama.evaluation.evaluate import evaluate
    from sparse_llama.evaluation.report import POSITION_HEADER, position_rows, to_rows
    from sparse_llama.evaluation.score import by_position
    from sparse_llama.reporting.tables import show_columns, show_table

    result = evaluate(
        open_asked(arguments),
        arguments.data,
        partition=arguments.partition,
        window=arguments.window,
        stride=arguments.stride,
        num_answers=arguments.exact_match,
        max_new_tokens=arguments.max_new_tokens,
    )
    if not is_main():
        return
    show_table("evaluation", to_rows(result))
    ranges: list[PositionRange] | None = None
    if arguments.by_position is not None:
        ranges = by_position(result.score, arguments.by_position)
        show_columns("by position in the window", POSITION_HEADER, position_rows(ranges))
    _write(arguments, result, ranges)


def _write(arguments: argparse.Namespace, result: "Evaluation", ranges: "list[PositionRange] | None") -> None:
    from sparse_llama.evaluation.answers import write_answers
    from sparse_llama.evaluation.report import positions_to_json, to_json

    if arguments.answers is not None:
        write_answers(arguments.answers, result.answers)
    if arguments.json is not None:
        by_position = {"by_position": None if ranges is None else positions_to_json(ranges)}
        _write_json(arguments, to_json(result) | by_position)
    if arguments.png is not None and ranges is not None:
        from sparse_llama.reporting.position_png import PositionCurve, save_by_position

        curve = PositionCurve(
            f"{result.model}, {result.attention}",
            [(part.first, part.last) for part in ranges],
            [part.score.perplexity for part in ranges],
        )
        save_by_position([curve], result.data, arguments.png)


def _write_json(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write ``found`` to ``--json``, with what was asked for and where it was measured."""
    from sparse_llama.training.metrics import device_name, git_commit, versions, write_json

    adapter = None if arguments.adapter is None else str(arguments.adapter)
    asked = {"model": arguments.model, "adapter": adapter, "data": arguments.data}
    where = {"device": device_name(), "versions": versions(), "git_commit": git_commit()}
    write_json(arguments.json, found | asked | where)
