"""What was measured, as sums: a loss per token, per word, per byte, and by the position in the window.

The losses are in nats.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

_LARGEST_EXPONENT = 709.0  # exp(710) is more than an fp64 can hold


@dataclass(frozen=True)
class Score:
    """Losses of predicted tokens, summed by the position of the token in its window.

    A token's position is the number of tokens before it that were read: from 1, as the first token of a
    window is predicted by none, to the window. Entry p of both tuples is of position p.
    """

    loss_sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def loss_sum(self) -> float:
        return math.fsum(self.loss_sums)

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def nll_per_token(self) -> float:
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        return perplexity(self.nll_per_token)

    def part(self, first: int, last: int) -> "Score":
        """Return the score of the positions from ``first`` to ``last``, both included."""
        kept = range(first, last + 1)
        return Score(
            tuple(loss if position in kept else 0.0 for position, loss in enumerate(self.loss_sums)),
            tuple(count if position in kept else 0 for position, count in enumerate(self.counts)),
        )


@dataclass(frozen=True)
class PositionRange:
    """The score of the tokens at positions ``first`` to ``last`` of their windows, both included."""

    first: int
    last: int
    score: Score


@dataclass(frozen=True)
class TextSize:
    """The words and bytes of text, by which scores of different tokenizers can be compared."""

    num_words: int
    num_bytes: int


def perplexity(mean_loss: float) -> float:
    """Return exp(``mean_loss``), infinite where no fp64 is as large."""
    return math.exp(mean_loss) if mean_loss < _LARGEST_EXPONENT else math.inf


def by_position(score: Score, num_ranges: int) -> list[PositionRange]:
    """Return ``score`` in ``num_ranges`` ranges of positions that are equally long, to a token.

    Ranges in which no token was scored are left out: with a stride below the window, all windows but the
    first score their last positions only.
    """
    last_position = len(score.counts) - 1
    num_ranges = min(num_ranges, last_position)
    ends = [number * last_position // num_ranges for number in range(num_ranges + 1)]
    ranges = [PositionRange(first + 1, last, score.part(first + 1, last)) for first, last in pairwise(ends)]
    return [part for part in ranges if part.score.num_tokens]


def text_size(documents: Iterable[str]) -> TextSize:
    r"""Return words and bytes (UTF-8) of ``documents``.

    Words are what white space separates, counted as lm-evaluation-harness does
    (``tasks/wikitext/preprocess_wikitext.py``): the pieces of ``re.split(r"\s+", document)``, among them an
    empty one for white space at either end of a document.
    """
    num_words = num_bytes = 0
    for document in documents:
        num_words += len(re.split(r"\s+", document))
        num_bytes += len(document.encode("utf-8"))
    return TextSize(num_words, num_bytes)


def word_perplexity(score: Score, size: TextSize) -> float:
    """Return exp of the loss per word: lm-evaluation-harness's ``word_perplexity``."""
    return perplexity(score.loss_sum / size.num_words)


def bits_per_byte(score: Score, size: TextSize) -> float:
    """Return the loss per byte in bits: lm-evaluation-harness's ``bits_per_byte``."""
    return score.loss_sum / size.num_bytes / math.log(2)
