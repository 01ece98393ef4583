"""Lists of heads, layers and tokens as people write them."""

import itertools
from collections.abc import Sequence

_MOST_RANGES = 12
_MOST_NUMBERS = 8


def in_short(values: Sequence[int]) -> str:
    """Return an ascending list as people write it: ``3``, ``0-31``, ``0, 4, ... 28``."""
    steps = {after - before for before, after in itertools.pairwise(values)}
    if steps == {1} and len(values) > 2 and values[0] >= 0:
        return f"{values[0]}-{values[-1]}"
    if len(steps) == 1 and len(values) > _MOST_NUMBERS:
        return f"{values[0]}, {values[1]}, ... {values[-1]}"
    left_out = len(values) - _MOST_NUMBERS
    return ", ".join(map(str, values[:_MOST_NUMBERS])) + (f" and {left_out} more" if left_out > 0 else "")


def ranges(spans: Sequence[tuple[int, int]]) -> str:
    """Return ranges of tokens as people write them, the last token included; of many the first and last."""
    written = [str(first) if last == first + 1 else f"{first}-{last - 1}" for first, last in spans]
    left_out = len(written) - _MOST_RANGES
    if left_out > 0:
        written[_MOST_RANGES // 2 : -_MOST_RANGES // 2] = [f"... {left_out:,} more ..."]
    return ", ".join(written)
