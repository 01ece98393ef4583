"""``launch/inspect_data.py``: what a run would train on, before it costs anything."""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_llama.cli.entry import is_main, world_size
from sparse_llama.cli.flags import Parser, add_run_flags, make_room_for, overrides, parser
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from sparse_llama.config.run import Run
    from sparse_llama.data.prepare import PreparedData
    from sparse_llama.data.tokenizer import Tokenizer
    from sparse_llama.data.view import SeenDocument

_ABOUT_DATA = ("model", "dataset", "seq_length", "micro_batch_size", "attention", "seed")
"""Flags of a run that change its rows."""
_BRACKETS = ("[[", "]]")  # around what is learned, where there are no colours


def inspect_data_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/inspect_data.py``: a run's data, and how much of them is shown."""
    from sparse_llama.config.flags import Overrides

    flags = parser(doc)
    names = {field.name for field in fields(Overrides)}
    add_run_flags(flags, without=names - set(_ABOUT_DATA))
    add = flags.add_argument_group("what is shown").add_argument
    add("--records", type=int, default=3, metavar="N", help="documents as the model sees them (default: 3)")
    add("--json", type=Path, metavar="FILE", help="write the numbers there too")
    return flags


def inspect_data(arguments: argparse.Namespace) -> None:
    """Show what is in the data, what becomes of it, and a few documents; no weights are read.

    Raises:
        SparseLlamaError: whatever a run of these data would be refused for before its model loads.
    """
    if not is_main():
        return  # rows are the same on all ranks
    if arguments.records < 0:
        raise ConfigError(f"--records: must be 0 (none) or above, got {arguments.records}")
    if arguments.json is not None:
        make_room_for("--json", arguments.json)
    from sparse_llama.config.run import load_run

    run = load_run(
        arguments.ds_config,
        overrides(arguments),
        _num_processes(arguments.ds_config),
        is_main=False,
        is_here=False,
    )
    from sparse_llama.reporting.tables import plain_console  # a second: torch

    console = plain_console()
    tokenizer, data = _read(run, console)
    _show(console, run, data, arguments.records, tokenizer)
    if arguments.json is not None:
        text = json.dumps(_to_json(run, data), indent=2) + "\n"
        arguments.json.write_text(text, encoding="utf-8")


def _num_processes(document: Path | None) -> int:
    """Return the processes of this job, or the fewest that the document is for: those that share a row."""
    from sparse_llama.config.document import read_document

    sharing = 1 if document is None else read_document(document).get("sequence_parallel_size", 1)
    return max(world_size(), sharing if isinstance(sharing, int) else 1)


def _read(run: "Run", console: "Console") -> tuple["Tokenizer", "PreparedData"]:
    from sparse_llama.data.prepare import prepare_data
    from sparse_llama.data.template import with_template
    from sparse_llama.data.tokenizer import load_tokenizer
    from sparse_llama.model.files import resolve_tokenizer

    settings = run.settings
    folder = resolve_tokenizer(settings.model.path, settings.model.revision)
    tokenizer = with_template(load_tokenizer(folder), folder, settings.data.template)
    console.print(f"reading {settings.data.dataset} ...")
    data = prepare_data(
        settings,
        tokenizer,
        align=run.layouts.align,
        micro_batch_size=run.micro_batch_size,
        accumulation=run.gradient_accumulation_steps,
        rank=0,
        world_size=1,
        console=console,
    )
    return tokenizer, data


def _show(
    console: "Console", run: "Run", data: "PreparedData", num_documents: int, tokenizer: "Tokenizer"
) -> None:
    from sparse_llama.reporting.histogram import make_bins, show_histogram
    from sparse_llama.reporting.tables import show_columns, show_table

    settings = run.settings
    rows = [
        ("tokenizer", f"{settings.model.path}, template {settings.data.template}"),
        *data.ledger.rows(),
        ("steps of an epoch", f"{_num_steps(run, data):,} of {run.global_batch_size:,} rows"),
    ]
    show_table("data", rows, console)
    counts = [data.ledger.training.categories, data.ledger.validation.categories]
    names = dict.fromkeys(name for part in counts for name in part)
    if names:
        table = [[name, *(f"{part.get(name, 0):,}" for part in counts)] for name in names]
        show_columns("categories", ["category", "training", "validation"], table, console)
    bins = make_bins(data.record_lengths.tolist())
    show_histogram("tokens of a training record", bins, settings.seq_length, console)
    for warning in data.ledger.warnings():
        console.print(f"warning: {warning}", style="yellow", markup=False)
    if num_documents > 0:
        _show_documents(console, run, data, num_documents, tokenizer)


def _show_documents(
    console: "Console", run: "Run", data: "PreparedData", num_documents: int, tokenizer: "Tokenizer"
) -> None:
    from itertools import islice

    from sparse_llama.data.view import seen_documents

    is_coloured = console.color_system is not None and not console.no_color
    mark = "in colour" if is_coloured else f"between {_BRACKETS[0]} and {_BRACKETS[1]}"
    console.print(f"the first rows of the first epoch; what the loss is on stands {mark}", markup=False)
    batches = data.batches.step(0, run.gradient_accumulation_steps)
    for document in islice(seen_documents(batches, tokenizer), num_documents):
        _show_document(console, document, is_coloured=is_coloured)


def _show_document(console: "Console", document: "SeenDocument", *, is_coloured: bool) -> None:
    from rich.text import Text

    padded = f", then {document.num_padded:,} of padding" if document.num_padded else ""
    console.rule(
        f"row {document.row + 1:,} from token {document.start:,}: {document.num_tokens:,} tokens, "
        f"{document.num_learned:,} in the loss{padded}",
        align="left",
        style="",
        characters="-",
    )
    text = Text()
    for span in document.spans:
        if is_coloured:
            text.append(span.text, style="bold green" if span.is_learned else "dim")
        else:
            text.append(span.text.join(_BRACKETS) if span.is_learned else span.text)
    console.print(text, soft_wrap=True)


def _num_steps(run: "Run", data: "PreparedData") -> int:
    return -(-data.batches.num_rows // run.global_batch_size)


def _to_json(run: "Run", data: "PreparedData") -> dict[str, Any]:
    from sparse_llama.reporting.histogram import make_bins

    settings = run.settings
    bins = make_bins(data.record_lengths.tolist())
    return {
        "model": settings.model.path,
        "template": settings.data.template,
        "seq_length": settings.seq_length,
        "steps_per_epoch": _num_steps(run, data),
        "histogram": [{"first": one.first, "last": one.last, "records": one.count} for one in bins],
        "warnings": data.ledger.warnings(),
        "data": data.ledger.to_json(),
    }
