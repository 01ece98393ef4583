"""The live line of a run on a terminal, or a plain line now and then in a log file."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparse_llama.reporting.tables import format_bytes, format_seconds
from sparse_llama.training.metrics import StepMetrics

_LOG_LINES = 20  # in a file: about one line per 5% of the run


class TrainingProgress:
    """Shows step, loss, tokens/s, time left and peak memory while a run goes on."""

    def __init__(self, console: Console, first_step: int, total_steps: int) -> None:
        self._console, self._first_step, self._total_steps = console, first_step, total_steps
        self._every = max(1, total_steps // _LOG_LINES)
        self._live = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=8),  # so the line fits 80 columns
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._live.add_task("training", total=total_steps, completed=first_step, figures="")
        self._started_s = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, metrics: StepMetrics) -> None:
        """Show one step."""
        figures = (
            f"loss {metrics.loss:.4f}  {metrics.tokens_per_s:,.0f} tokens/s  "
            f"peak {format_bytes(metrics.peak_memory_bytes)}"
        )
        self._live.update(self._task, completed=metrics.step, figures=figures)
        done = metrics.step - self._first_step
        if done == 1:
            self._started_s = metrics.elapsed_s
        is_due = metrics.step % self._every == 0 or metrics.step == self._total_steps or done == 1
        if not self._console.is_terminal and is_due:
            remaining = self._total_steps - metrics.step
            pace_s = (metrics.elapsed_s - self._started_s) / (done - 1) if done > 1 else 0.0
            eta = format_seconds(pace_s * remaining) if done > 1 else "-"
            self._console.print(
                f"step {metrics.step}/{self._total_steps}  {figures}  ETA {eta}", highlight=False
            )
