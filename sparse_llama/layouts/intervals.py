"""A set of blocks as sorted, disjoint column intervals per block row: memory in proportion to the intervals.

Every mode is a union of windows, bands, rows and columns, so 524,288 tokens in blocks of 16 are a few
megabytes; DeepSpeed's (H, N, N) int64 tensor would be 256 GiB. Where rows have many intervals in common
(``fixed`` with 4 local blocks has 134 million, 8,192 of them distinct), these are held once.
"""

from functools import cached_property
from typing import NamedTuple

import torch

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Rows, starts and ends of intervals, each (R,), in any order; empty intervals are allowed."""


class SharedIntervals(NamedTuple):
    """Intervals that rows have in common: row i begins with those from ``firsts[i]`` to ``lasts[i]``."""

    starts: torch.Tensor
    """(M,) int64."""
    ends: torch.Tensor
    """(M,) int64."""
    firsts: torch.Tensor
    """(N,) int64."""
    lasts: torch.Tensor
    """(N,) int64."""


class Intervals:
    """Blocks [starts, ends) of each of ``num_rows`` block rows, as compressed sparse rows.

    ``row_starts``, ``starts``, ``ends`` and ``rows`` list what is shared once for every row: where N is
    large, take ``first_rows`` before, or ``row``.
    """

    def __init__(
        self,
        row_starts: torch.Tensor,
        starts: torch.Tensor,
        ends: torch.Tensor,
        shared: SharedIntervals | None = None,
    ) -> None:
        """Args:
        row_starts: (N + 1,) int64, row i owns the intervals row_starts[i] to row_starts[i + 1].
        starts: (R,) int64, first block of an interval.
        ends: (R,) int64, one past its last block; the next interval of the row starts later still.
        shared: what rows begin with before their own.
        """
        self._own = (row_starts, starts, ends)
        self._shared = shared

    @property
    def num_rows(self) -> int:
        return self._own[0].numel() - 1

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What the set is held in; equal tensors are equal sets."""
        return (*self._own, *(self._shared or ()))

    @property
    def row_starts(self) -> torch.Tensor:
        """(N + 1,) int64: row i has the intervals row_starts[i] to row_starts[i + 1]."""
        return self._listed[0]

    @property
    def starts(self) -> torch.Tensor:
        """(R,) int64, first block of an interval."""
        return self._listed[1]

    @property
    def ends(self) -> torch.Tensor:
        """(R,) int64, one past its last block; the next interval of the row starts later still."""
        return self._listed[2]

    @property
    def rows(self) -> torch.Tensor:
        """The row of every interval, (R,)."""
        return torch.repeat_interleave(torch.arange(self.num_rows), self.row_starts.diff())

    @property
    def nbytes(self) -> int:
        """Bytes held, as long as nothing has been listed."""
        return sum(t.numel() * t.element_size() for t in (*self._own, *(self._shared or ())))

    def row(self, index: int) -> list[tuple[int, int]]:
        """Return the intervals of one row, in order."""
        row_starts, starts, ends = self._own
        own = slice(int(row_starts[index]), int(row_starts[index + 1]))
        found = list(zip(starts[own].tolist(), ends[own].tolist(), strict=True))
        if self._shared is None:
            return found
        begin = slice(int(self._shared.firsts[index]), int(self._shared.lasts[index]))
        common = zip(self._shared.starts[begin].tolist(), self._shared.ends[begin].tolist(), strict=True)
        return [*common, *found]

    def row_sizes(self) -> torch.Tensor:
        """Return how many blocks each row has, (N,) int64."""
        row_starts, starts, ends = self._own
        sizes = _running_sum(ends - starts)[row_starts].diff()
        if self._shared is None:
            return sizes
        reach = _running_sum(self._shared.ends - self._shared.starts)
        return sizes + reach[self._shared.lasts] - reach[self._shared.firsts]

    def num_blocks(self) -> int:
        """Return how many blocks are in the set."""
        return int(self.row_sizes().sum())

    def equals(self, other: "Intervals") -> bool:
        """Return whether both hold the same blocks; the intervals of a set are unique."""
        return all(torch.equal(a, b) for a, b in zip(self._listed, other._listed, strict=True))

    def first_rows(self, num_rows: int) -> "Intervals":
        """Return the first ``num_rows`` rows; of a causal set, the crop [:num_rows, :num_rows]."""
        return self.some_rows(0, num_rows)

    def some_rows(self, first: int, last: int) -> "Intervals":
        """Return rows [first, last), counted from 0; the columns stay."""
        assert 0 <= first <= last <= self.num_rows
        row_starts, starts, ends = self._own
        own = slice(int(row_starts[first]), int(row_starts[last]))
        shared = self._shared
        if shared is not None:
            shared = shared._replace(firsts=shared.firsts[first:last], lasts=shared.lasts[first:last])
        return Intervals(row_starts[first : last + 1] - own.start, starts[own], ends[own], shared)

    def to_dense(self, first_row: int = 0) -> torch.Tensor:
        """Return rows ``first_row`` to N as an (N - first_row, N) bool table; few rows, or small N."""
        edges = torch.zeros(self.num_rows - first_row, self.num_rows + 1, dtype=torch.int64)
        skipped = int(self.row_starts[first_row])
        rows = torch.repeat_interleave(torch.arange(len(edges)), self.row_starts[first_row:].diff())
        edges.index_put_((rows, self.starts[skipped:]), torch.ones_like(rows), accumulate=True)
        edges.index_put_((rows, self.ends[skipped:]), -torch.ones_like(rows), accumulate=True)
        return edges.cumsum(1)[:, :-1].bool()

    @cached_property
    def _listed(self) -> Triple:
        if self._shared is None:
            return self._own
        row_starts, starts, ends = self._own
        own_rows = torch.repeat_interleave(torch.arange(self.num_rows), row_starts.diff())
        rows, picked = spread(self._shared.firsts, self._shared.lasts)
        # Shared intervals come first in their rows, so a stable sort by row puts all in order.
        order = torch.sort(torch.cat([rows, own_rows]), stable=True).indices
        counts = (self._shared.lasts - self._shared.firsts) + row_starts.diff()
        return (
            _running_sum(counts),
            torch.cat([self._shared.starts[picked], starts])[order],
            torch.cat([self._shared.ends[picked], ends])[order],
        )


def union(num_rows: int, parts: list[Triple]) -> Intervals:
    """Return the union of intervals: sorted, and merged where they touch or overlap; vectorised."""
    rows, starts, ends = (torch.cat([part[index] for part in parts]) for index in range(3))
    is_real = starts < ends
    rows, starts, ends = rows[is_real], starts[is_real], ends[is_real]
    if rows.numel() == 0:
        empty = torch.zeros(0, dtype=torch.int64)
        return Intervals(torch.zeros(num_rows + 1, dtype=torch.int64), empty, empty)
    # One number line with a gap between rows, so that rows never touch: merging is then one running maximum.
    width = int(ends.max()) + 1
    first, order = torch.sort(rows * width + starts)
    reach = torch.cummax((rows * width + ends)[order], 0).values
    opens = torch.ones_like(first, dtype=torch.bool)
    opens[1:] = first[1:] > reach[:-1]
    closes = torch.cat([opens[1:], torch.ones(1, dtype=torch.bool)])
    merged_rows = first[opens] // width
    row_starts = _running_sum(torch.bincount(merged_rows, minlength=num_rows))
    return Intervals(row_starts, first[opens] - merged_rows * width, reach[closes] - merged_rows * width)


def spread(firsts: torch.Tensor, lasts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of all ranges [first, last), and before them which range each is of."""
    counts = (lasts - firsts).clamp(min=0)
    owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return owners, torch.arange(len(owners)) + (firsts - (counts.cumsum(0) - counts))[owners]


def _running_sum(counts: torch.Tensor) -> torch.Tensor:
    """Return 0 and the sums of the first 1, 2, ... counts."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
