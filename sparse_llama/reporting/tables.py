"""Terminal tables, the console they go to, and numbers as people read them."""

import sys
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 110  # of a file or a pipe, which has none of its own


def plain_console(*, is_quiet: bool = False) -> Console:
    """Return a console that colours no numbers, as wide as the terminal."""
    return Console(quiet=is_quiet, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


def show_table(title: str, rows: Iterable[tuple[str, str]], console: Console | None = None) -> None:
    """Print ``rows`` of label and value under ``title``."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, Text(value))
    (console or Console()).print(table)


def show_columns(
    title: str, header: list[str], rows: Iterable[list[str]], console: Console | None = None
) -> None:
    """Print a table with a header line."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    (console or Console()).print(table)


def format_bytes(count: int) -> str:
    """Return ``count`` in binary units: ``1.5 GiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Return a duration: ``42s``, ``3m 05s``, ``2h 07m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def format_step(seconds: float) -> str:
    """Return the duration of a step, most of which take less than a minute: ``1.25 s``, ``3m 05s``."""
    return format_seconds(seconds) if seconds >= 60 else f"{seconds:.2f} s"


def format_share(share: float) -> str:
    """Return a fraction as a percentage: ``87%``."""
    return f"{100 * share:.0f}%"
