"""Where the documents of a packed batch lie; each attends to itself alone, by a layout of its own.

A document starts where ``position_ids`` is 0. Nothing else says so: no mask comes from outside, so whatever
moves tokens between processes has to move their positions only.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Group:
    """Documents at the same place in several rows: one kernel call serves them all."""

    rows: tuple[int, ...]
    first: int
    last: int
    """Tokens [first, last) of these rows."""

    @property
    def num_tokens(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Documents:
    """All documents of a (B, T) batch."""

    num_rows: int
    num_tokens: int
    groups: tuple[Group, ...]

    @property
    def is_one_per_row(self) -> bool:
        return len(self.groups) == 1

    def cut(self, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        """Return the (rows, heads, tokens, ...) part of a (B, heads, T, ...) tensor."""
        tokens = tensor[:, :, group.first : group.last]
        return tokens if len(group.rows) == self.num_rows else tokens[list(group.rows)]

    def put(self, tensor: torch.Tensor, group: Group, part: torch.Tensor) -> None:
        """Write ``part`` where ``cut`` reads."""
        if len(group.rows) == self.num_rows:
            tensor[:, :, group.first : group.last] = part
        else:
            tensor[list(group.rows), :, group.first : group.last] = part


def whole_rows(num_rows: int, num_tokens: int) -> Documents:
    """Return one document per row."""
    return Documents(num_rows, num_tokens, (Group(tuple(range(num_rows)), 0, num_tokens),))


def find_documents(position_ids: torch.Tensor, num_rows: int) -> Documents:
    """Return the documents that (B, T) or (1, T) position ids describe.

    Positions count 0, 1, 2, ... in a document; any other step is ours to prevent, and would silently give a
    token the wrong place in its layout.
    """
    positions = position_ids.expand(num_rows, -1)
    is_start = positions == 0
    is_next = positions[:, 1:] == positions[:, :-1] + 1
    assert bool(is_start[:, 0].all()), "a row does not begin with a document"
    assert bool((is_start[:, 1:] | is_next).all()), "positions do not count 0, 1, 2, ..."
    num_tokens = positions.shape[1]
    places: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    starts = is_start.nonzero().tolist()
    for (row, first), (next_row, last) in zip(starts, [*starts[1:], (num_rows, 0)], strict=True):
        places[first, last if next_row == row else num_tokens].append(row)
    groups = (Group(tuple(rows), first, last) for (first, last), rows in sorted(places.items()))
    return Documents(num_rows, num_tokens, tuple(groups))
