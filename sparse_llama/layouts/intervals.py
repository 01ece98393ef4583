"""A set of blocks as sorted, disjoint column intervals per block row: memory in proportion to the intervals.

Every mode is a union of windows, bands, rows and columns, so 524,288 tokens in blocks of 16 are a few hundred
thousand intervals, a few megabytes; DeepSpeed's (H, N, N) int64 tensor would be 256 GiB.
"""

from dataclasses import dataclass

import torch

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Rows, starts and ends of intervals, each (R,), in any order; empty intervals are allowed."""


@dataclass(frozen=True, eq=False)
class Intervals:
    """Blocks [starts, ends) of each of ``num_rows`` block rows, as compressed sparse rows."""

    row_starts: torch.Tensor
    """(N + 1,) int64: row i owns the intervals row_starts[i] to row_starts[i + 1]."""
    starts: torch.Tensor
    """(R,) int64, first block of an interval."""
    ends: torch.Tensor
    """(R,) int64, one past its last block; the next interval of the row starts later still."""

    @property
    def num_rows(self) -> int:
        return self.row_starts.numel() - 1

    @property
    def rows(self) -> torch.Tensor:
        """The row of every interval, (R,)."""
        return torch.repeat_interleave(torch.arange(self.num_rows), self.row_starts.diff())

    def num_blocks(self) -> int:
        """Return how many blocks are in the set."""
        return int((self.ends - self.starts).sum())

    def equals(self, other: "Intervals") -> bool:
        """Return whether both hold the same blocks; the intervals of a set are unique."""
        mine, theirs = (
            (self.row_starts, self.starts, self.ends),
            (other.row_starts, other.starts, other.ends),
        )
        return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def first_rows(self, num_rows: int) -> "Intervals":
        """Return the first ``num_rows`` rows; of a causal set, the crop [:num_rows, :num_rows]."""
        assert num_rows <= self.num_rows
        last = int(self.row_starts[num_rows])
        return Intervals(self.row_starts[: num_rows + 1], self.starts[:last], self.ends[:last])

    def first_columns(self, num_columns: int) -> "Intervals":
        """Return the blocks of the first ``num_columns`` columns."""
        return union(self.num_rows, [(self.rows, self.starts, self.ends.clamp(max=num_columns))])

    def causal(self) -> "Intervals":
        """Return the blocks on and below the diagonal."""
        rows = self.rows
        return union(self.num_rows, [(rows, self.starts, torch.minimum(self.ends, rows + 1))])

    def to_dense(self, first_row: int = 0) -> torch.Tensor:
        """Return rows ``first_row`` to N as an (N - first_row, N) bool table; few rows, or small N."""
        edges = torch.zeros(self.num_rows - first_row, self.num_rows + 1, dtype=torch.int64)
        skipped = int(self.row_starts[first_row])
        rows = torch.repeat_interleave(torch.arange(len(edges)), self.row_starts[first_row:].diff())
        edges.index_put_((rows, self.starts[skipped:]), torch.ones_like(rows), accumulate=True)
        edges.index_put_((rows, self.ends[skipped:]), -torch.ones_like(rows), accumulate=True)
        return edges.cumsum(1)[:, :-1].bool()


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
    row_starts = torch.zeros(num_rows + 1, dtype=torch.int64)
    row_starts[1:] = torch.bincount(merged_rows, minlength=num_rows).cumsum(0)
    return Intervals(row_starts, first[opens] - merged_rows * width, reach[closes] - merged_rows * width)


def rectangles(corners: list[tuple[int, int, int, int]]) -> Triple:
    """Return rectangles (first row, last row, first column, last column), ends exclusive, as intervals."""
    table = torch.tensor(corners, dtype=torch.int64).reshape(-1, 4)
    heights = (table[:, 1] - table[:, 0]).clamp(min=0)
    owner = torch.repeat_interleave(torch.arange(len(table)), heights)
    within = torch.arange(owner.numel()) - torch.repeat_interleave(heights.cumsum(0) - heights, heights)
    return table[owner, 0] + within, table[owner, 2], table[owner, 3]
