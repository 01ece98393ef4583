"""What a probe found, as a table that grows, and as curves over the length."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sparse_llama.planning.probe import NOT_APPLICABLE, OUT_OF_MEMORY, Cell, Outcome, Probe
from sparse_llama.reporting.curves import Curve, Panel
from sparse_llama.reporting.tables import format_bytes, format_step, plain_console

_RUNNING = "running ..."
_GIB = 2**30


class LiveTable:
    """On a terminal a table whose rows fill up; elsewhere a line for each cell as it ends."""

    def __init__(self, probe: Probe) -> None:
        self._probe, self._console = probe, plain_console()
        self._cells: list[Cell] = []
        self._running: Cell | None = None
        self._live: Live | None = None

    @contextmanager
    def showing(self, cells: Sequence[Cell]) -> Iterator[None]:
        """Show ``cells``, and those that begin meanwhile."""
        self._cells = list(cells)
        if not self._console.is_terminal:
            yield
            return
        with Live(
            console=self._console, get_renderable=self._table, refresh_per_second=2, transient=True
        ) as live:
            self._live = live
            yield
        self._live = None

    def begin(self, cell: Cell) -> None:
        """Show that a cell is being measured."""
        self._running = cell
        if cell not in self._cells:
            self._cells.append(cell)

    def end(self, cell: Cell) -> None:
        """Show what came of it."""
        self._running = None
        if self._live is None:
            self._console.print(_line(self._probe.outcomes[cell], cell), soft_wrap=True, markup=False)

    def _table(self) -> Table:
        return _table(self._probe, self._cells, self._running)


def show_probe(probe: Probe, cells: Sequence[Cell]) -> None:
    """Print the table of ``cells``, and below it why some are not there."""
    console = plain_console()
    ordered = sorted(
        cells, key=lambda cell: (cell.zero_stage, cell.offload != "none", cell.offload, cell.num_tokens)
    )
    console.print(_table(probe, ordered, None))
    for text in _notes(probe, ordered):
        console.print(text, soft_wrap=True, markup=False)
    console.print()


def show_longest(probe: Probe, pairs: Sequence[tuple[int, str]]) -> None:
    """Print the longest row that fits, for each stage and offload that has one."""
    table = Table(title="longest row that fits", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("ZeRO", "offload", "tokens", "out of memory at"):
        table.add_column(name, justify="left" if name == "offload" else "right")
    for stage, offload in pairs:
        longest = probe.longest.get((stage, offload))
        if longest is None:
            continue
        beyond = [
            cell.num_tokens
            for cell, outcome in probe.outcomes.items()
            if (cell.zero_stage, cell.offload) == (stage, offload) and outcome.status == OUT_OF_MEMORY
        ]
        fails = f"{min(beyond):,}" if beyond else "-"
        table.add_row(str(stage), offload, f"{longest:,}" if longest else "none", fails)
    plain_console().print(table)


def panels(probe: Probe, cells: Sequence[Cell]) -> list[list[Panel]]:
    """Return panels of peaks and of step times; empty where nothing fitted."""
    on_gpu = _is_on_gpu(probe)
    found = [
        (cell, figures)
        for cell in sorted(cells, key=lambda cell: cell.num_tokens)
        if (figures := probe.outcomes[cell].figures) is not None
    ]
    if not found:
        return []
    planned = [(cell, size / _GIB) for cell, _ in found if (size := _planned(probe.outcomes[cell], on_gpu))]
    dashed = _curves(planned, is_dashed=True)
    budget = None if probe.budget_bytes is None else probe.budget_bytes / _GIB
    process = _curves([(cell, one.peak_run_bytes / _GIB) for cell, one in found])
    host = Panel("host memory beyond the libraries", "GiB", process, level=None if on_gpu else budget)
    steps = Panel("optimizer step", "s", _curves([(cell, one.step_s) for cell, one in found]))
    if on_gpu:
        gpu = _curves([(cell, one.peak_gpu_bytes / _GIB) for cell, one in found])
        return [[Panel("peak GPU memory; dashed: planned", "GiB", gpu + dashed, level=budget), host, steps]]
    tensors = _curves([(cell, one.peak_tensor_bytes / _GIB) for cell, one in found if one.peak_tensor_bytes])
    return [[host, Panel("tensors at one time; dashed: planned", "GiB", tensors + dashed), steps]]


def _curves(values: Sequence[tuple[Cell, float]], *, is_dashed: bool = False) -> list[Curve]:
    """Return a curve of each stage and offload."""
    groups: dict[str, list[tuple[int, float]]] = {}
    for cell, value in values:
        name = f"stage {cell.zero_stage}, offload {cell.offload}"
        groups.setdefault(name, []).append((cell.num_tokens, value))
    return [
        Curve(name, *map(list, zip(*points, strict=True)), is_dashed=is_dashed)
        for name, points in groups.items()
    ]


def _table(probe: Probe, cells: Sequence[Cell], running: Cell | None) -> Table:
    table = Table(title=_title(probe), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in _header(probe):
        table.add_column(name, justify="left" if name in ("offload", "result") else "right", no_wrap=True)
    for cell in cells:
        table.add_row(*map(Text, _row(probe, cell, running)))
    return table


def _title(probe: Probe) -> str:
    if probe.budget_bytes is None:
        return "memory and time of a step, measured"
    what = "of each GPU" if _is_on_gpu(probe) else "beyond the libraries"
    return f"memory and time of a step, measured; budget {format_bytes(probe.budget_bytes)} {what}"


def _header(probe: Probe) -> list[str]:
    start, end = ["ZeRO", "offload", "tokens", "result"], ["step"]
    if _is_on_gpu(probe):
        return [*start, "GPU", "reserved", "planned", "host", "planned", *end]
    return [*start, "host", "beyond", "tensors", "planned", *end]


def _row(probe: Probe, cell: Cell, running: Cell | None) -> list[str]:
    outcome = probe.outcomes.get(cell)
    start = [str(cell.zero_stage), cell.offload, f"{cell.num_tokens:,}"]
    empty = len(_header(probe)) - len(start) - 1
    if outcome is None:
        return [*start, _RUNNING if cell == running else "", *[""] * empty]
    figures, on_gpu = outcome.figures, _is_on_gpu(probe)
    planned = _bytes(_planned(outcome, on_gpu))
    if figures is None:
        values = [""] * empty
        values[2 if on_gpu else 3] = planned
        return [*start, outcome.status, *values]
    host = _bytes(figures.peak_host_bytes)
    if on_gpu:
        reserved = _bytes(figures.peak_gpu_reserved_bytes)
        values = [_bytes(figures.peak_gpu_bytes), reserved, planned, host, _bytes(_planned(outcome, False))]
    else:
        values = [host, _bytes(figures.peak_run_bytes), _bytes(figures.peak_tensor_bytes or None), planned]
    return [*start, outcome.status, *values, format_step(figures.step_s)]


def _line(outcome: Outcome, cell: Cell) -> str:
    """Return a cell as a line of a log."""
    line = f"stage {cell.zero_stage}, offload {cell.offload}, {cell.num_tokens:,} tokens: {outcome.status}"
    figures = outcome.figures
    if figures is None:
        return line
    gpu = f"{format_bytes(figures.peak_gpu_bytes)} of the GPU, " if figures.peak_gpu_bytes else ""
    return f"{line}, {gpu}{format_bytes(figures.peak_host_bytes)} of the host, {figures.step_s:.2f} s a step"


def _notes(probe: Probe, cells: Sequence[Cell]) -> Iterator[str]:
    """Yield each reason once, with the cells that it is of."""
    reasons: dict[str, list[Cell]] = {}
    for cell in cells:
        outcome = probe.outcomes[cell]
        if outcome.reason:
            reasons.setdefault(f"{outcome.status}: {outcome.reason}", []).append(cell)
    if not _is_on_gpu(probe):
        yield (
            "host: the whole process; beyond: without Python and its libraries, but with what the C library "
            "keeps of freed\nmemory; tensors: at one time, by PyTorch's allocator; planned: them, by the plan"
        )
    for reason, of in reasons.items():
        is_pair = reason.startswith(NOT_APPLICABLE)
        names = dict.fromkeys(
            f"stage {cell.zero_stage}, offload {cell.offload}" + ("" if is_pair else f", {cell.num_tokens:,}")
            for cell in of
        )
        yield f"{'; '.join(names)}: {reason}"


def _is_on_gpu(probe: Probe) -> bool:
    figures = [one.figures for one in probe.outcomes.values() if one.figures is not None]
    return any(one.peak_gpu_bytes for one in figures)


def _planned(outcome: Outcome, on_gpu: bool) -> int | None:
    return None if outcome.planned_bytes is None else outcome.planned_bytes.get("gpu" if on_gpu else "host")


def _bytes(count: int | None) -> str:
    return "" if count is None else format_bytes(count)
