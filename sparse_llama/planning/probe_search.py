"""The longest row that fits, by trying: doubled until it does not, then bisected."""

from collections.abc import Callable
from dataclasses import dataclass

from sparse_llama.planning.probe import OUT_OF_MEMORY, Outcome

_MOST_TOKENS = 2**22
_PARTS = 16  # of the length that fits: as close as the search comes, about 6%


@dataclass(frozen=True)
class Bracket:
    """Where the longest row lies."""

    fits: int
    """Tokens; 0 where nothing fits."""
    fails: int | None
    """The shortest that was tried and ran out of memory; None where nothing did."""
    other: Outcome | None = None
    """What ended the search before its end, if it was not memory."""


def find_longest(try_length: Callable[[int], Outcome], start: int, step: int) -> Bracket:
    """Return the longest of the multiples of ``step`` that fits, to a sixteenth of itself or one step.

    Args:
        start: tokens to begin with.
    """
    fits, fails = 0, None
    length = max(start // step, 1) * step
    while (fails is None or fails - fits > _resolution(fits, step)) and length <= _MOST_TOKENS:
        outcome = try_length(length)
        if outcome.fits:
            fits = length
        elif outcome.status == OUT_OF_MEMORY:
            fails = length
        else:
            return Bracket(fits, fails, outcome)
        length = 2 * fits if fails is None else (fits + fails) // 2 // step * step
        if length <= fits:
            break
    return Bracket(fits, fails)


def _resolution(fits: int, step: int) -> int:
    return max(fits // _PARTS // step, 1) * step
