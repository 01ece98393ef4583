"""``launch/benchmark.py memory``: what a step takes, lever by lever, beside others."""

import argparse
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_llama.benchmark.shapes import SHAPES
from sparse_llama.cli.adapter_cost import origin_with_peft
from sparse_llama.cli.results import (
    budget_bytes,
    device_slug,
    make_folder,
    numbers,
    results_console,
    split,
    tell_files,
)
from sparse_llama.config.section import suggest
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from sparse_llama.benchmark.memory import Contender, MemoryBook, MemoryCell
    from sparse_llama.benchmark.provenance import Provenance
    from sparse_llama.planning.probe import Outcome

MEMORY_FLAGS = ("lengths", "shape", "contenders", "rungs", "budget_gib", "longest", "overwrite")
_LENGTHS = {"cpu": (4096, 16384, 131072), "cuda": (4096, 16384, 65536, 262144)}
_BUDGET_BYTES = {"cpu": 16 * 2**30, "cuda": 40 * 2**30}
_SHAPE = {"cpu": "narrow", "cuda": "7b"}
_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
_WORK = Path("runs") / "benchmark_memory"


def add_memory_flags(flags: argparse.ArgumentParser) -> None:
    """Add what only ``memory`` takes."""
    add = flags.add_argument_group("memory, with --lengths, --shape").add_argument
    add(
        "--contenders",
        metavar="A,B",
        help="v1, v2, transformers, transformers_checkpointed, peft_checkpointed; on CUDA "
        "transformers_offloaded (default: all)",
    )
    add("--rungs", metavar="A,B", help="none, checkpointing, loss_tile, ...: levers of v1 and v2 (all)")
    add("--budget_gib", type=float, metavar="X", help="of each process (default: 16; on CUDA 40)")
    add(
        "--longest",
        action="store_true",
        default=None,
        help="plan the longest row of each, and measure it where --lengths has a longer one",
    )
    add("--overwrite", action="store_true", default=None, help="forget what an earlier call has measured")


def memory_cost(arguments: argparse.Namespace) -> None:
    """Measure what is not there yet, print and save each as it comes.

    Raises:
        ConfigError: a flag is wrong, or the file holds other measurements.
    """
    lengths = numbers("lengths", arguments.lengths)
    budget = budget_bytes(arguments.budget_gib)
    make_folder(arguments.output_dir)
    from sparse_llama.benchmark.memory import BLOCK, MemoryBook
    from sparse_llama.distributed.ranks import device

    place = device()
    lengths = lengths or _LENGTHS[place.type]
    wrong = [length for length in lengths if length % BLOCK]
    if wrong:
        raise ConfigError(f"--lengths: must be multiples of the block, {BLOCK}, got {wrong[0]}")
    contenders, left_out = _contenders(arguments, place.type)
    origin = origin_with_peft()
    name = f"memory_{device_slug(origin.hardware, place)}"
    book = MemoryBook(
        file=arguments.output_dir / f"{name}.json",
        folder=_WORK,
        shape=SHAPES[arguments.shape or _SHAPE[place.type]],
        device=place.type,
        dtype=_DTYPE[place.type],
        budget_bytes=budget or _BUDGET_BYTES[place.type],
    )
    if arguments.overwrite:
        book.file.unlink(missing_ok=True)
    _measure(book, contenders, lengths, origin, is_longest=bool(arguments.longest), left_out=left_out)


def _measure(
    book: "MemoryBook",
    contenders: "list[Contender]",
    lengths: tuple[int, ...],
    origin: "Provenance",
    *,
    is_longest: bool,
    left_out: dict[str, str],
) -> None:
    from sparse_llama.benchmark.memory import next_cell
    from sparse_llama.benchmark.memory_report import (
        CELL_HEADER,
        LONGEST_HEADER,
        cell_row,
        contenders_of,
        longest_row,
        memory_subject,
        save_memory,
    )
    from sparse_llama.reporting.tables import show_columns, show_table

    console = results_console()
    show_table("benchmark", [("measured", memory_subject(book)), ("hardware", origin.hardware)], console)
    for one, reason in left_out.items():
        print(f"not measured: {one}; {reason}")
    num_found = book.resume(_identity(book, origin))
    if num_found:
        print(f"{book.file}: {num_found} measurements are there already")
    book.prepare()
    while (cell := next_cell(contenders, lengths, lambda one: _outcome(book, one))) is not None:
        _measure_one(book, cell, origin)
    if is_longest:
        _measure_longest(book, contenders, max(lengths), origin)
    book.save(asdict(origin))
    for length in sorted({cell.num_tokens for cell in book.cells}):
        cells = [cell for cell in book.cells if cell.num_tokens == length]
        show_columns(f"{length:,} tokens", CELL_HEADER, [cell_row(book, cell) for cell in cells], console)
    rows = [longest_row(book, one) for one in contenders_of(book)]
    show_columns("longest row", LONGEST_HEADER, rows, console)
    tell_files(save_memory(book, origin, left_out))


def _measure_one(book: "MemoryBook", cell: "MemoryCell", origin: "Provenance") -> None:
    from sparse_llama.benchmark.memory import measure_cell
    from sparse_llama.benchmark.memory_report import show_outcome

    book.cells[cell] = measure_cell(book, cell)
    book.save(asdict(origin))
    print(show_outcome(book, cell, book.cells[cell]), flush=True)


def _measure_longest(
    book: "MemoryBook", contenders: "list[Contender]", most: int, origin: "Provenance"
) -> None:
    """Plan each one's longest row; measure it and a row an eighth longer, where they are not too long."""
    from sparse_llama.benchmark.memory import BLOCK, MemoryCell, plan_longest

    for contender in contenders:
        if not contender.is_ours:
            continue
        if contender not in book.longest:
            book.longest[contender] = plan_longest(book, contender)
            book.save(asdict(origin))
        planned = book.longest[contender]
        for length in (planned, planned * 9 // 8 // BLOCK * BLOCK):
            cell = MemoryCell(contender, length)
            if 0 < length <= most and cell not in book.cells:
                _measure_one(book, cell, origin)


def _outcome(book: "MemoryBook", cell: "MemoryCell") -> "Outcome | None":
    measured = book.cells.get(cell)
    return None if measured is None else measured.outcome


def _identity(book: "MemoryBook", origin: "Provenance") -> dict[str, object]:
    """Return what two calls must have in common for one to go on where the other stopped."""
    return {
        "shape": asdict(book.shape),
        "dtype": book.dtype,
        "budget_bytes": book.budget_bytes,
        "hardware": origin.hardware,
        "versions": origin.versions,
    }


def _contenders(arguments: argparse.Namespace, kind: str) -> "tuple[list[Contender], dict[str, str]]":
    """Return what is measured, and what is not, with the reason."""
    from sparse_llama.benchmark.llamas import NO_PEFT
    from sparse_llama.benchmark.memory import ADAPTERS, ONLY_ON_GPU, OTHERS, RUNG_KEYS, Contender

    known = [*OTHERS, *ADAPTERS]
    kinds = known if arguments.contenders is None else _chosen("contenders", arguments.contenders, known)
    chosen = list(RUNG_KEYS)
    if arguments.rungs is not None:
        chosen = _chosen("rungs", arguments.rungs, chosen)
    left_out: dict[str, str] = {}
    if kind == "cpu":
        left_out = {OTHERS[one]: "it moves nothing on a CPU" for one in ONLY_ON_GPU if one in kinds}
    if find_spec("peft") is None and "peft_checkpointed" in kinds:
        left_out[OTHERS["peft_checkpointed"]] = NO_PEFT
    others = [Contender(one) for one in kinds if one in OTHERS and OTHERS[one] not in left_out]
    ours = [Contender(one, rung) for one in ADAPTERS if one in kinds for rung in RUNG_KEYS if rung in chosen]
    return [*others, *ours], left_out


def _chosen(flag: str, text: str, known: list[str]) -> list[str]:
    for name in split(text):
        if name not in known:
            raise ConfigError(f"--{flag}: none is called {name!a}{suggest(name, known)}")
    return split(text)
