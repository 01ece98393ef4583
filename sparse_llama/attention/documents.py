"""Where the documents of a packed batch lie; each attends to itself alone, by a layout of its own.

In a model a document starts where ``position_ids`` is 0. Nothing else says so: no mask comes from outside, so
whatever moves tokens between processes has to move their positions only. Whoever calls the attention alone
names each token's document.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

from sparse_llama.errors import ConfigError


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
        """Whether every row is one document from end to end."""
        return len(self.groups) == 1 and self.is_whole

    @property
    def is_whole(self) -> bool:
        """Whether every token is in a document; the others are padding, which attends to nothing."""
        return (
            sum(group.num_tokens * len(group.rows) for group in self.groups)
            == self.num_rows * self.num_tokens
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max((group.num_tokens for group in self.groups), default=0)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return memory to ``put`` the documents' results into; zero where a token is in none."""
        return torch.empty_like(tensor) if self.is_whole else torch.zeros_like(tensor)

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
    return _group(is_start, torch.ones_like(is_start))


def read_documents(ids: torch.Tensor) -> Documents:
    """Return the documents that a (B, T) table of document numbers describes; -1 is padding.

    A document is a run of equal numbers.

    Raises:
        ConfigError: the table is no such table.
    """
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(f"documents: must be (B, T) integers, got {ids.dtype} of shape {tuple(ids.shape)}")
    if ids.numel() and int(ids.min()) < -1:
        raise ConfigError(f"documents: {int(ids.min())} is no document; count from 0, -1 is padding")
    is_start = torch.ones_like(ids, dtype=torch.bool)
    is_start[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return _group(is_start, ids >= 0)


def _group(is_start: torch.Tensor, is_real: torch.Tensor) -> Documents:
    """Return the documents that start where ``is_start``; those that are not ``is_real`` are left out."""
    num_rows, num_tokens = is_start.shape
    places: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    starts = is_start.nonzero().tolist()
    real = is_real[is_start].tolist()
    ends = [*starts[1:], (num_rows, 0)]
    for (row, first), (next_row, last), is_document in zip(starts, ends, real, strict=True):
        if is_document:
            places[first, last if next_row == row else num_tokens].append(row)
    groups = (Group(tuple(rows), first, last) for (first, last), rows in sorted(places.items()))
    return Documents(num_rows, num_tokens, tuple(groups))
