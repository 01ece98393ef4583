"""How often each length occurs, as bars in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

_MOST_BINS = 12
_BAR_CHARACTERS = 48
_STEPS = (1, 2, 5)


@dataclass(frozen=True)
class Bin:
    """Lengths from ``first`` to ``last``, both included."""

    first: int
    last: int
    count: int


def make_bins(lengths: Sequence[int]) -> list[Bin]:
    """Return at most 12 bins of one round width from 1 to the longest of ``lengths``; none of nothing."""
    if not lengths:
        return []
    width = _round_width(max(lengths))
    counts = [0] * (-(-max(lengths) // width) or 1)
    for length in lengths:
        counts[max(length - 1, 0) // width] += 1
    return [Bin(1 + place * width, (place + 1) * width, count) for place, count in enumerate(counts)]


def show_histogram(title: str, bins: Sequence[Bin], limit: int, console: Console) -> None:
    """Print ``bins`` as bars; those that begin beyond ``limit`` say so."""
    most = max(one.count for one in bins)
    label = max(len(f"{one.first:,}-{one.last:,}") for one in bins)
    is_unicode = console.encoding.lower().startswith("utf")
    console.print(title, style="italic")
    for one in bins:
        filled = -(-one.count * _BAR_CHARACTERS // most)  # one record is seen beside a million
        bar = ("\u2588" if is_unicode else "#") * filled
        beyond = f"  longer than {limit:,}" if one.first > limit and one.count else ""
        line = Text(f" {f'{one.first:,}-{one.last:,}':>{label}}  {bar} {one.count:,}{beyond}")
        console.print(line, style="yellow" if beyond else "")
    console.print()


def _round_width(longest: int) -> int:
    """Return the least of 1, 2, 5, 10, 20, ... of which 12 reach ``longest``."""
    power = 1
    while True:
        for step in _STEPS:
            if step * power * _MOST_BINS >= longest:
                return step * power
        power *= 10
