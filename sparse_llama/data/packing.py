"""Documents side by side in rows of one length, each training as it would alone.

A document starts at position 0 and at a multiple of ``align`` tokens, the block of a sparse layout: it then
has the blocks that it has alone. Attention keeps documents apart by their positions. The gap up to the next
multiple, and the rest of a row, continue the positions of the document before and have no labels.
"""

import random
from bisect import bisect_left, insort
from dataclasses import dataclass

import torch

IGNORED = -100
PADDING = 0  # an id that every vocabulary has: LLaMA's own pad id is -1, which no embedding has


@dataclass(frozen=True)
class Document:
    """Ids and labels of one document; its first label is -100, as nothing before it predicts it."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True, eq=False)
class Row:
    """Tokens of one row, equally many of each; int32, as a corpus stays in memory for the whole run."""

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)


def one_per_row(documents: list[Document]) -> list[Row]:
    """Return every document as a row of its own length."""
    return [_lay_out([document], len(document.ids), align=1) for document in documents]


def pack(documents: list[Document], *, row_length: int, align: int, seed: int) -> list[Row]:
    """Return rows of ``row_length`` tokens that hold every document whole.

    Best fit, in an order drawn from ``seed``: each document goes where it leaves the least room. Taking the
    longest first would fill rows better still and put documents of one length, often of one kind, together.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    rows: list[list[Document]] = []
    rooms: list[tuple[int, int]] = []  # sorted; tokens left from the next aligned place on, and the row
    for index in order:
        length = len(documents[index].ids)
        assert length <= row_length
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = row_length, len(rows)
            rows.append([])
        rows[number].append(documents[index])
        taken = _round_up(length, align)
        if room > taken:
            insort(rooms, (room - taken, number))
    return [_lay_out(row, row_length, align) for row in rows]


def _lay_out(documents: list[Document], row_length: int, align: int) -> Row:
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for number, document in enumerate(documents, start=1):
        length = len(document.ids)
        span = _round_up(length, align) if number < len(documents) else row_length - len(ids)
        ids += document.ids + [PADDING] * (span - length)
        labels += document.labels + [IGNORED] * (span - length)
        positions += range(span)
    return Row(*(torch.tensor(values, dtype=torch.int32) for values in (ids, positions, labels)))


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
