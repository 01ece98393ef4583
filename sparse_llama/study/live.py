"""The runs of a study as they go on: on a terminal a table that fills up, elsewhere a line for each event."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from rich import box
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sparse_llama.reporting.tables import format_bytes, format_seconds, plain_console
from sparse_llama.study.results import Result, read_results
from sparse_llama.study.runner import DONE
from sparse_llama.study.runs import Study

_REFRESH_S = 1.0
_HEADER = ("run", "", "step", "train loss", "validation", "tokens/s", "peak", "time")


class LiveStudy:
    """Shows every run of a study: what it is doing, or what came of it."""

    def __init__(self, study: Study) -> None:
        self._study, self._console = study, plain_console()
        self._doing = ("", "")  # a run's name, and what is being done with it
        self._since_s = self._shown_s = 0.0
        self._live: Live | None = None

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show the table until the block is left."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            self._live = live
            yield
        self._live = None

    def begin(self, name: str, what: str) -> None:
        """Show that something is being done with a run."""
        self._doing, self._since_s = (name, what), perf_counter()
        if self._live is None:
            self._console.print(f"{name}: {what} ...", soft_wrap=True, markup=False)

    def end(self, said: str) -> None:
        """Show what came of it."""
        (name, _), elapsed = self._doing, format_seconds(perf_counter() - self._since_s)
        self._doing = ("", "")
        if self._live is None:
            self._console.print(f"{name}: {said}, {elapsed}", soft_wrap=True, markup=False)

    def refresh(self) -> None:
        """Show the table anew, at most once a second, as it reads every run's files; does nothing elsewhere
        than on a terminal."""
        if self._live is not None and perf_counter() - self._shown_s >= _REFRESH_S:
            self._live.update(self._table(), refresh=True)
            self._shown_s = perf_counter()

    def show(self) -> None:
        """Print the table as it is now."""
        self._console.print(self._table())

    def _table(self) -> Table:
        table = Table(title=self._study.name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in _HEADER:
            table.add_column(name, justify="left" if name in ("run", "") else "right", no_wrap=name == "run")
        for result in read_results(self._study).runs:
            table.add_row(*map(Text, self._row(result)))
        name, what = self._doing
        if name:
            table.caption = f"{name}: {what}, {format_seconds(perf_counter() - self._since_s)}"
            table.caption_justify = "left"
        return table

    def _row(self, result: Result) -> list[str]:
        name, (doing, what) = result.run.name, self._doing
        if result.summary is not None:
            one = result.summary
            state = what if name == doing else _state_of_measuring(result)
            figures = [
                str(one["steps"]),
                f"{one['train_loss']:.4f}",
                f"{one['validation_loss']:.4f}",
                f"{one['tokens_per_s']:,.0f}",
                format_bytes(result.peak_bytes or 0),
                format_seconds(one["elapsed_s"]),
            ]
            return [name, state, *figures]
        if name == doing:
            return [name, what, *_progress(result)]
        ended = result.outcome is not None and result.outcome.status != DONE
        return [name, result.outcome.status if ended and result.outcome else "waiting", *[""] * 6]


def _state_of_measuring(result: Result) -> str:
    if result.measured is not None:
        return "done"
    return "trained" if result.measuring is None else "not measured"


def _progress(result: Result) -> list[str]:
    """Return the figures of a run's last step so far."""
    file = result.folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if not lines:
        return [""] * 6
    last = json.loads(lines[-1])
    return [
        str(last["step"]),
        f"{last['loss']:.4f}",
        "",
        f"{last['tokens_per_s']:,.0f}",
        format_bytes(last["peak_memory_bytes"]),
        format_seconds(last["elapsed_s"]),
    ]
