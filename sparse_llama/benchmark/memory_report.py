"""What ``benchmark.memory`` found, as tables, as Markdown for readers, and as curves."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from sparse_llama.benchmark.memory import (
    ADAPTERS,
    BLOCK,
    LONG,
    Contender,
    MeasuredCell,
    MemoryBook,
    MemoryCell,
)
from sparse_llama.benchmark.provenance import Provenance
from sparse_llama.benchmark.report import markdown_table, origin_lines
from sparse_llama.planning.levers import TILE
from sparse_llama.planning.probe import OUT_OF_MEMORY, Figures, Outcome
from sparse_llama.reporting.curves import Curve, Panel, save_curves
from sparse_llama.reporting.tables import format_bytes, format_seconds, format_step

CELL_HEADER = ["model", "result", "peak", "tensors", "planned", "off by", "step"]
LONGEST_HEADER = ["model", "fits", "out of memory at", "by the plan"]
_NONE = "-"


def memory_subject(book: MemoryBook) -> str:
    """Return what is measured, in words."""
    shape = book.shape
    heads = f"{shape.num_heads} heads of {shape.head_dim}, MLP {shape.mlp_width:,}"
    model = f"{shape.num_layers} layers, width {shape.width:,}, {heads}, vocabulary {shape.vocabulary:,}"
    return f"The memory of a training step: {model}, {book.dtype}, within {format_bytes(book.budget_bytes)}"


def cell_row(book: MemoryBook, cell: MemoryCell) -> list[str]:
    """Return a measurement under ``CELL_HEADER``."""
    outcome = book.cells[cell].outcome
    name, planned = book.name_of(cell.contender), planned_peak(book, outcome)
    shown = _NONE if planned is None else format_bytes(planned)
    if outcome.figures is None:
        return [name, outcome.status, _NONE, _NONE, shown, _NONE, _NONE]
    tensors = tensor_peak(book, outcome.figures)
    is_known = planned is not None and tensors > 0
    return [
        name,
        outcome.status,
        format_bytes(peak(book, outcome.figures)),
        format_bytes(tensors) if tensors else _NONE,
        shown,
        f"{(planned or 0) / tensors - 1:+.1%}" if is_known else _NONE,
        format_step(outcome.figures.step_s),
    ]


def longest_row(book: MemoryBook, contender: Contender) -> list[str]:
    """Return how far one came under ``LONGEST_HEADER``."""
    own = {cell.num_tokens: one.outcome for cell, one in book.cells.items() if cell.contender == contender}
    fits = [length for length, outcome in own.items() if outcome.fits]
    fails = [length for length, outcome in own.items() if outcome.status == OUT_OF_MEMORY]
    planned = book.longest.get(contender)
    return [
        book.name_of(contender),
        f"{max(fits):,}" if fits else "none",
        f"{min(fails):,}" if fails else _NONE,
        _NONE if planned is None else f"{planned:,}",
    ]


def peak(book: MemoryBook, figures: Figures) -> int:
    """Return what the budget is of: on a CPU the process beyond its libraries."""
    return figures.peak_gpu_reserved_bytes if book.device == "cuda" else figures.peak_run_bytes


def tensor_peak(book: MemoryBook, figures: Figures) -> int:
    """Return what the allocator had given out, which is what is planned; 0 where that is not known."""
    return figures.peak_gpu_bytes if book.device == "cuda" else figures.peak_tensor_bytes


def planned_peak(book: MemoryBook, outcome: Outcome) -> int | None:
    """Return the plan of the same."""
    if outcome.planned_bytes is None:
        return None
    return outcome.planned_bytes["gpu" if book.device == "cuda" else "host"]


def save_memory(book: MemoryBook, origin: Provenance, left_out: dict[str, str]) -> list[Path]:
    """Write the Markdown and the PNG beside the JSON file; return the paths of all three."""
    files = [book.file, book.file.with_suffix(".md"), book.file.with_suffix(".png")]
    files[1].write_text(_markdown(book, origin, left_out), encoding="utf-8")
    save_curves(memory_panels(book), f"{memory_subject(book)}: {origin.hardware}", files[2])
    return files


def memory_panels(book: MemoryBook) -> list[list[Panel]]:
    """Return a column for each adapter: peaks, what ran out of memory above the budget, and step times."""
    others = [one for one in contenders_of(book) if not one.is_ours]
    versions = [kind for kind in ADAPTERS if any(one.kind == kind for one in contenders_of(book))]
    peaks, times = [], []
    for kind in versions or [""]:
        shown = [*others, *(one for one in contenders_of(book) if one.kind == kind)]
        title = f"LLaMA-Adapter {kind}" if kind else "others"
        found = [(contender, *_points(book, contender)) for contender in shown]
        peaks.append(
            Panel(
                f"{title}: peak of the process, crosses: out of memory",
                "GiB",
                [
                    _curve(book, one, [peak(book, each) / 2**30 for each in fitting.values()], fitting, fails)
                    for one, fitting, fails in found
                ],
                is_log=True,
                level=book.budget_bytes / 2**30,
            )
        )
        curves = [_curve(book, one, [each.step_s for each in fit.values()], fit, ()) for one, fit, _ in found]
        times.append(Panel(f"{title}: step", "s", curves, is_log=True))
    return [peaks, times]


def contenders_of(book: MemoryBook) -> list[Contender]:
    """Return what was measured: others first, then each adapter up its ladder."""
    order = [rung.key for rung in book.rungs]
    return sorted(
        {cell.contender for cell in book.cells},
        key=lambda one: (
            (one.is_ours, one.kind, order.index(one.rung)) if one.is_ours else (False, _rank(one), 0)
        ),
    )


def _rank(other: Contender) -> str:
    return f"{other.kind.startswith('peft')}{len(other.kind):03}"


def _points(book: MemoryBook, contender: Contender) -> tuple[dict[int, Figures], list[int]]:
    """Return the figures by length, and the lengths that ran out of memory."""
    own = {cell.num_tokens: one.outcome for cell, one in book.cells.items() if cell.contender == contender}
    fitting = {length: own[length].figures for length in sorted(own) if own[length].figures is not None}
    fails = [length for length, outcome in sorted(own.items()) if outcome.status == OUT_OF_MEMORY]
    return {length: figures for length, figures in fitting.items() if figures is not None}, fails


def _curve(
    book: MemoryBook,
    contender: Contender,
    values: Sequence[float],
    fitting: dict[int, Figures],
    fails: Sequence[int],
) -> Curve:
    label = book.name_of(contender).removeprefix(f"{contender.kind}, ") if contender.is_ours else ""
    return Curve(
        label or book.name_of(contender),
        list(fitting),
        values,
        is_dashed=not contender.is_ours,
        fails_at=tuple(fails),
    )


def _markdown(book: MemoryBook, origin: Provenance, left_out: dict[str, str]) -> str:
    where = "allocated on the GPU" if book.device == "cuda" else "resident, beyond Python and its libraries"
    lengths = sorted({cell.num_tokens for cell in book.cells})
    measured = sum(one.elapsed_s for one in book.cells.values())
    lines = [
        f"# {memory_subject(book)}",
        "",
        "Real steps - forward, backward, optimizer - of one row of random tokens, every one predicted, each",
        f"in a process of its own. `peak` is {where}:",
        "what the budget limits. `tensors` is the most that PyTorch's allocator had given out at a time, by",
        "its own record; `planned` the same by the plan, made without running; `off by` the plan over the",
        "record. Levers are cumulative.",
        "",
        f"![peak and time over the length]({book.file.with_suffix('.png').name})",
        "",
        "## The longest row",
        "",
        "Measured lengths only: the longest that fitted, and the shortest that did not. A plan counts",
        "tensors; what the C library keeps of freed ones comes on top, so that a row as long as planned can",
        "be a little too long.",
        "",
        markdown_table(LONGEST_HEADER, (longest_row(book, one) for one in contenders_of(book))),
    ]
    for length in lengths:
        rows = [
            cell_row(book, MemoryCell(one, length))
            for one in contenders_of(book)
            if MemoryCell(one, length) in book.cells
        ]
        lines += [f"## {length:,} tokens", "", markdown_table(CELL_HEADER, rows)]
    lines += [*_reasons(book), *origin_lines(origin), *_protocol(book, measured)]
    lines += [f"* Not measured: {name}; {reason}." for name, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def _reasons(book: MemoryBook) -> Iterable[str]:
    """Yield where memory ran out, or what else went wrong."""
    found = [
        (f"{book.name_of(cell.contender)}, {cell.num_tokens:,}", one.outcome)
        for cell, one in book.cells.items()
        if one.outcome.reason
    ]
    if found:
        yield "## Where memory ran out"
        yield ""
        yield from (f"* {name}: {outcome.status} {outcome.reason}." for name, outcome in found)
        yield ""


def _protocol(book: MemoryBook, measured_s: float) -> list[str]:
    logits = max((cell.num_tokens for cell in book.cells), default=0) * book.shape.vocabulary * 4
    return [
        f"* Protocol: {format_seconds(measured_s)} for all processes, one after the other. From "
        f"{LONG:,} tokens on the",
        "  first step is timed, below it the second, and one more recorded, which has no room beside a long",
        "  row. After a row that ran out of memory longer ones are left out, but for the longest.",
        f"* The base is frozen, of random weights. Ours: block-sparse attention, {BLOCK} a block, each of",
        f"  which sees itself, the 7 before it and the first; tiles of {TILE:,} tokens, 4 head groups.",
        "  `transformers`: its own model, attention (full, PyTorch's) and loss; nothing trains and the",
        "  backward pass runs through every layer: no gradients of weights and no optimizer take memory.",
        "  `checkpointing` there is its own, non-reentrant.",
        f"* The logits of the longest row are {format_bytes(logits)}; transformers' loss needs them, their",
        "  log-softmax and a gradient at the same time.",
    ]


def show_outcome(book: MemoryBook, cell: MemoryCell, measured: MeasuredCell) -> str:
    """Return a line for each measurement as it ends."""
    figures, name = measured.outcome.figures, f"{book.name_of(cell.contender)}, {cell.num_tokens:,} tokens"
    if figures is None:
        return f"{name}: {measured.outcome.status} {measured.outcome.reason}"
    return f"{name}: {format_bytes(peak(book, figures))}, {format_step(figures.step_s)} a step"
