"""Rows as the model sees them: documents one by one, and which of their tokens are in the loss."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

from sparse_llama.data.batches import Batch
from sparse_llama.data.packing import IGNORED
from sparse_llama.data.template import named_tokens
from sparse_llama.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens that are all predicted, or all given."""

    text: str
    is_learned: bool


@dataclass(frozen=True)
class SeenDocument:
    """A document in its row."""

    row: int
    """Counted from 0 over all micro-batches."""
    start: int
    """Its first token's place in the row."""
    num_tokens: int
    num_learned: int
    num_padded: int
    """Tokens behind it, up to the next document or the end of the row."""
    spans: tuple[Span, ...]


def seen_documents(batches: Iterable[Batch], tokenizer: Tokenizer) -> Iterator[SeenDocument]:
    """Yield the documents of whole micro-batches, row by row; each ends with a token that is learned."""
    rows = (row for batch in batches for row in zip(*batch.tables(), strict=True))
    for number, (ids, positions, labels) in enumerate(rows):
        # what is predicted at a token is the label of the next
        is_learned = [False, *(label != IGNORED for label in labels[:-1].tolist())]
        starts = (positions == 0).nonzero()[:, 0].tolist()
        for start, end in pairwise([*starts, len(ids)]):
            learned = [place for place in range(start, end) if is_learned[place]]
            last = 1 + max(learned, default=start)
            spans = _spans(ids[start:last].tolist(), is_learned[start:last], tokenizer)
            yield SeenDocument(number, start, last - start, len(learned), end - last, tuple(spans))


def _spans(ids: list[int], is_learned: list[bool], tokenizer: Tokenizer) -> Iterator[Span]:
    named = named_tokens(tokenizer)
    place = 0
    for learned, group in groupby(is_learned):
        end = place + sum(1 for _ in group)
        yield Span(_text(ids, place, end, named, tokenizer), learned)
        place = end


def _text(ids: list[int], first: int, last: int, named: dict[int, str], tokenizer: Tokenizer) -> str:
    """Return what ``ids[first:last]`` add to the text before them, with the names of tokens that are none."""
    parts: list[str] = []
    place = first
    for is_named, group in groupby(ids[first:last], key=lambda token: token in named):
        end = place + sum(1 for _ in group)
        if is_named:
            parts += [named[token] for token in ids[place:end]]
        else:
            begin = max((at + 1 for at in range(place) if ids[at] in named), default=0)
            before = tokenizer.decode(ids[begin:place])  # a decoder drops the space before a first word
            parts.append(tokenizer.decode(ids[begin:end])[len(before) :])
        place = end
    return "".join(parts)
