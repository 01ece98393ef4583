"""What a mode draws on the (N, N) grid of blocks, before anything is listed row by row; and its causal rows.

A rectangle is four numbers however many rows it has: ``fixed`` with 4 local blocks at 524,288 tokens is 8,192
rectangles and a window a row, where its rows have 134 million intervals below the diagonal.
"""

from dataclasses import dataclass

import torch

from sparse_llama.layouts.intervals import Intervals, SharedIntervals, Triple, spread, union

Corners = tuple[int, int, int, int]
"""First row, last row, first column, last column of a rectangle; the lasts are exclusive."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """Blocks as one head's layout has them: what is in ``rows``, ``rectangles`` and diagonals."""

    num_blocks: int
    rows: tuple[Triple, ...] = ()
    rectangles: tuple[Corners, ...] = ()
    stride: int = 0
    """Also every block i, j with (i - j) mod ``stride`` = 0; ``rows`` then has the ``stride`` blocks up to
    the row's own. 0 is none."""
    is_lower: bool = False
    """Whether what lies above the diagonal is cut off."""

    def to_dense(self, num_blocks: int) -> torch.Tensor:
        """Return the first ``num_blocks`` rows and columns as a bool table."""
        drawn = [*self.rows, _expand(_table(self.rectangles), num_blocks)]
        if self.stride:
            drawn.append(_diagonals(self.stride, num_blocks))
        parts: list[Triple] = []
        for rows, starts, ends in drawn:
            inside = rows < num_blocks
            parts.append((rows[inside], starts[inside], ends[inside].clamp(max=num_blocks)))
        table = union(num_blocks, parts).to_dense()
        return table.tril() if self.is_lower else table

    def causal(self) -> Intervals:
        """Return the blocks on and below the diagonal.

        Columns that reach down to the last row are not listed in every row: a row begins with those before
        its own intervals, and all rows have the one list of them.
        """
        if self.stride:
            return _strided(self.num_blocks, self.stride)
        table = _table(self.rectangles)
        is_column = (table[:, 0] <= table[:, 2]) & (table[:, 1] == self.num_blocks)
        drawn = [*self.rows, _expand(table[~is_column], self.num_blocks)]
        own = union(self.num_blocks, [(rows, starts, ends.minimum(rows + 1)) for rows, starts, ends in drawn])
        firsts, lasts = table[is_column, 2], table[is_column, 3]
        columns = union(1, [(torch.zeros_like(firsts), firsts, lasts)])
        return _with_columns(own, columns.starts, columns.ends)


def _table(rectangles: tuple[Corners, ...]) -> torch.Tensor:
    return torch.tensor(rectangles, dtype=torch.int64).reshape(-1, 4)


def _expand(rectangles: torch.Tensor, num_blocks: int) -> Triple:
    """Return the rows, up to ``num_blocks``, of (R, 4) rectangles."""
    owners, rows = spread(rectangles[:, 0], rectangles[:, 1].clamp(max=num_blocks))
    return rows, rectangles[owners, 2], rectangles[owners, 3]


def _diagonals(stride: int, num_blocks: int) -> Triple:
    """Return every ``stride``-th block of each row, its own among them."""
    remainders = torch.arange(num_blocks) % stride
    rows, places = spread(torch.zeros_like(remainders), (num_blocks - 1 - remainders) // stride + 1)
    starts = remainders[rows] + places * stride
    return rows, starts, starts + 1


def _with_columns(own: Intervals, starts: torch.Tensor, ends: torch.Tensor) -> Intervals:
    """Return the union of ``own`` and of columns, sorted and disjoint, each from its diagonal blocks down."""
    rows, is_empty = torch.arange(own.num_rows), own.row_starts.diff() == 0
    own_starts, own_ends = (
        torch.where(is_empty, rows + 1, torch.cat([bounds, bounds.new_zeros(1)])[own.row_starts[:-1]])
        for bounds in (own.starts, own.ends)
    )  # of each row's first interval
    begun = torch.searchsorted(starts, rows, right=True)
    # A column that ends where a row's own begins is one interval with it.
    before = torch.searchsorted(ends, own_starts)
    if int(before.sum()) <= 2 * own.num_rows:  # too few to hold them apart
        before = torch.zeros_like(rows)
        spans = [(before, begun)]
    else:  # of those that the first interval meets, it covers all but the first
        after = torch.maximum(before + 1, torch.searchsorted(ends, own_ends, right=True))
        spans = [(before, begun.minimum(before + 1)), (after, begun)]
    parts = [(own.rows, own.starts, own.ends)]
    for owners, places in (spread(*span) for span in spans):
        parts.append((owners, starts[places], ends[places].minimum(owners + 1)))
    merged = union(own.num_rows, parts)
    if not before.any():
        return merged
    shared = SharedIntervals(starts, ends, torch.zeros_like(before), before)
    return Intervals(merged.row_starts, merged.starts, merged.ends, shared)


def _strided(num_blocks: int, stride: int) -> Intervals:
    """Return the ``stride`` blocks up to each row's own, and every ``stride``-th block before."""
    rows = torch.arange(num_blocks)
    reach = num_blocks if stride == 1 else stride  # a window and the nearest before it, which touches it
    window = union(num_blocks, [(rows, (rows - reach).clamp(min=0), rows + 1)])
    if stride == 1:
        return window
    # Rows of one remainder begin with the blocks of this remainder: one list, ever more of it.
    remainders = rows % stride
    starts = torch.sort(remainders, stable=True).indices
    counts = torch.bincount(remainders, minlength=stride)
    firsts = (counts.cumsum(0) - counts)[remainders]
    lasts = firsts + (rows // stride - 1).clamp(min=0)
    shared = SharedIntervals(starts, starts + 1, firsts, lasts)
    return Intervals(window.row_starts, window.starts, window.ends, shared)
