"""Documents side by side in rows of one length, each training as it would alone.

A document starts at position 0 and at a multiple of ``align`` tokens, the block of a sparse layout: it then
has the blocks that it has alone. Attention keeps documents apart by their positions. The gap up to the next
multiple, and the rest of a row, continue the positions of the document before and have no labels.
"""

import random
from bisect import bisect_left, insort
from dataclasses import dataclass

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """Tokens of one row, equally many of each."""

    ids: list[int]
    positions: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Document:
    """Ids and labels of one document; its first label is -100, as nothing before it predicts it."""

    ids: list[int]
    labels: list[int]


def one_per_row(documents: list[Document]) -> list[Row]:
    """Return every document as a row of its own length."""
    return [Row(one.ids, list(range(len(one.ids))), one.labels) for one in documents]


def pack(documents: list[Document], *, row_length: int, align: int, seed: int) -> list[Row]:
    """Return rows of ``row_length`` tokens that hold every document whole.

    Best fit, in an order drawn from ``seed``: each document goes where it leaves the least room. Taking the
    longest first would fill rows better still and put documents of one length, often of one kind, together.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    rows: list[list[int]] = []
    rooms: list[
        tuple[int, int]
    ] = []  # (free tokens, row), sorted; free tokens from the next aligned start on
    for index in order:
        length = len(documents[index].ids)
        assert length <= row_length
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            free, row = rooms.pop(place)
        else:
            free, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        taken = -(-length // align) * align
        if free > taken:
            insort(rooms, (free - taken, row))
    return [_lay_out([documents[index] for index in row], row_length, align) for row in rows]


def _lay_out(documents: list[Document], row_length: int, align: int) -> Row:
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for number, document in enumerate(documents):
        is_last = number + 1 == len(documents)
        start = len(ids)
        length = len(document.ids)
        span = row_length - start if is_last else -(-length // align) * align
        ids += document.ids + [document.ids[-1]] * (span - length)
        positions += range(span)
        labels += document.labels + [IGNORED] * (span - length)
    return Row(ids, positions, labels)
