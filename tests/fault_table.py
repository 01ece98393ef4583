"""What became of the faults that tests inject: counted by kind, one table at the end of the session.

Counts travel with the reports of their tests, so that those of pytest-xdist's workers arrive as well.
"""

from collections.abc import Iterable
from typing import Any

import pytest
from rich import box
from rich.console import Console
from rich.table import Table

PROPERTY = "faults"


class FaultsRecord:
    """Counts of one test; call it as often as there are kinds, or rounds of one kind."""

    def __init__(self, item: pytest.Item) -> None:
        self._item = item
        self.lost: dict[str, int] = {}
        """By kind; empty where all survived."""

    def __call__(self, kind: str, *, injected: int, survived: int) -> None:
        """Count ``injected`` faults of ``kind``, of which ``survived`` cost nothing.

        A fault is survived where the program refused it in one line, or went on with the right result.
        """
        assert 0 <= survived <= injected, f"{kind}: {survived} of {injected}"
        self._item.user_properties.append((PROPERTY, [kind, injected, survived]))
        if survived < injected:
            self.lost[kind] = self.lost.get(kind, 0) + injected - survived


def count_faults(reports: Iterable[Any]) -> dict[str, tuple[int, int]]:
    """Return the faults injected and survived of each kind, in the order in which kinds were first told."""
    counts: dict[str, tuple[int, int]] = {}
    for report in reports:
        if getattr(report, "when", None) != "call":  # setup and teardown repeat what the call has told
            continue
        for name, value in report.user_properties:
            if name == PROPERTY:
                kind, injected, survived = value
                before = counts.get(kind, (0, 0))
                counts[kind] = (before[0] + injected, before[1] + survived)
    return counts


def show_faults(terminal: Any) -> None:
    """Print the table below the results of a session; nothing where no fault was injected."""
    counts = count_faults(report for reports in terminal.stats.values() for report in reports)
    if not counts:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("fault")
    for name in ("injected", "survived", "lost"):
        table.add_column(name, justify="right")
    for kind, (injected, survived) in sorted(counts.items()):
        style = "" if survived == injected else "bold red"
        table.add_row(kind, *(f"{n:,}" for n in (injected, survived, injected - survived)), style=style)
    injected, survived = (sum(pair[place] for pair in counts.values()) for place in (0, 1))
    table.add_section()
    table.add_row("all", *(f"{number:,}" for number in (injected, survived, injected - survived)))
    console = Console(width=100, no_color=not terminal.hasmarkup, force_terminal=terminal.hasmarkup)
    with console.capture() as captured:
        console.print(table)
    terminal.section("faults injected on purpose")
    terminal.write_line(captured.get().rstrip())
