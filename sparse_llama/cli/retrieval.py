"""``launch/evaluate.py --retrieval``: what a model finds in long texts, as a table, JSON and a heat map."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sparse_llama.cli.entry import is_main
from sparse_llama.cli.flags import Parser
from sparse_llama.cli.results import numbers, results_console
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from sparse_llama.evaluation.retrieval import Retrieval
    from sparse_llama.model.assemble import OpenedModel

_FLAGS = ("lengths", "depths", "trials", "seed")
_TEXT_FLAGS = ("partition", "window", "stride", "by_position", "exact_match", "answers")
_DEPTHS, _TRIALS, _SEED = 5, 4, 42


def add_retrieval_flags(flags: Parser) -> None:
    """Add ``--retrieval`` and what belongs to it."""
    add = flags.add_argument_group("retrieval").add_argument
    add(
        "--retrieval",
        choices=("needle", "pairs"),
        help="instead: find a number in long texts, of filler (or of --data), or of other numbers",
    )
    add(
        "--lengths",
        metavar="N,N",
        help="tokens of prompt and answer (default: a quarter, a half and all of --window's default)",
    )
    add(
        "--depths", type=int, metavar="N", help=f"places in the text, at equal distances (default: {_DEPTHS})"
    )
    add("--trials", type=int, metavar="N", help=f"texts of each length and depth (default: {_TRIALS})")
    add("--seed", type=int, metavar="N", help=f"of the texts (default: {_SEED})")


def check_retrieval_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that would have no effect, with ``--retrieval`` or without."""
    if arguments.retrieval is None:
        for name in _FLAGS:
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name}: belongs to --retrieval; add it, or leave this out")
        return
    for name in _TEXT_FLAGS:
        if getattr(arguments, name) not in (None, 0):
            raise ConfigError(f"--{name}: has no part in --retrieval; leave one of them out")
    numbers("lengths", arguments.lengths)


def measure_retrieval(arguments: argparse.Namespace, opened: "OpenedModel") -> dict[str, Any] | None:
    """Measure, show and draw; return what ``--json`` holds, on the main rank."""
    from sparse_llama.evaluation.retrieval import retrieve
    from sparse_llama.reporting.tables import show_columns, show_table

    result = retrieve(
        opened,
        arguments.retrieval,
        data=arguments.data,
        lengths=numbers("lengths", arguments.lengths),
        num_depths=_DEPTHS if arguments.depths is None else arguments.depths,
        trials=_TRIALS if arguments.trials is None else arguments.trials,
        seed=_SEED if arguments.seed is None else arguments.seed,
    )
    if not is_main():
        return None
    show_table("retrieval", _rows(result))
    header = ["depth", *(f"{length:,} tokens" for length in result.lengths)]
    rows = [
        [f"{depth:.0%}", *(f"{cell.exact:.0%}, loss {cell.loss:.3f}" for cell in cells)]
        for depth, cells in zip(result.depths, result.by_depth(), strict=True)
    ]
    show_columns("right answers, and losses", header, rows, results_console())
    if arguments.png is not None:
        from sparse_llama.evaluation.retrieval_png import draw_retrieval

        draw_retrieval(result, arguments.png)
    found = asdict(result) | {"exact": result.exact, "loss": result.loss}
    return found | {"description": found.pop("model")}  # "model" is what was asked for


def _rows(result: "Retrieval") -> list[tuple[str, str]]:
    from sparse_llama.reporting.tables import format_seconds, format_share

    return [
        ("model", result.model),
        ("task", f"{result.kind}, in {result.haystack}; seed {result.seed}, {result.trials} texts each"),
        ("attention", result.attention),
        ("positions", result.positions),
        ("precision", f"{result.dtype}, losses fp32, sums fp64"),
        ("right answers", format_share(result.exact)),
        ("loss of the right answer", f"{result.loss:.4f} nats per token"),
        ("time", format_seconds(result.elapsed_s)),
    ]
