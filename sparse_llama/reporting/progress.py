"""How far something has come that may take a moment or many minutes: nothing is shown of a moment."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparse_llama.reporting.tables import format_seconds

Item = TypeVar("Item")

_QUIET_S = 1.0
_LINE_EVERY_S = 10.0  # in a file


def count_through(
    items: Iterable[Item],
    total: int,
    what: str,
    console: Console,
    *,
    now_s: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """Yield ``items`` and show how many of ``total`` are done, once that has taken more than a second.

    A terminal gets one live line, a file a plain line every 10 s.
    """
    started_s = shown_s = now_s()
    live: Progress | None = None
    try:
        for number, item in enumerate(items):
            current_s = now_s()
            if live is not None:
                live.update(live.task_ids[0], completed=number)
            elif current_s - started_s > _QUIET_S and console.is_terminal:
                live = _start(console, what, total)
            elif current_s - shown_s > (_QUIET_S if shown_s == started_s else _LINE_EVERY_S):
                shown_s = current_s
                left = format_seconds((current_s - started_s) * (total - number) / max(number, 1))
                console.print(f"{what} {number:,}/{total:,}  ETA {left}")
            yield item
    finally:
        if live is not None:
            live.stop()


def _start(console: Console, what: str, total: int) -> Progress:
    live = Progress(
        TextColumn(what),
        MofNCompleteColumn(),
        BarColumn(bar_width=8),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    live.add_task(what, total=total)
    live.start()
    return live
