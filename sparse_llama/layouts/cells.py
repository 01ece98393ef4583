"""A layout to be looked at: token pairs counted in the cells of a grid, and the tokens that a token sees.

No (N, N) table: how many pairs lie left of a cell's edge follows from where intervals start and end, so a
count is linear in the intervals plus the cells.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sparse_llama.layouts.intervals import Intervals, union

_ROWS_AT_ONCE = 1024  # of blocks: a row may share thousands of intervals with others, 134 million in all
Span = tuple[int, int]
"""Tokens [first, last)."""


@dataclass(frozen=True)
class Grid:
    """Cells of ``row_blocks`` x ``column_blocks`` blocks over the (T, T) pairs of a row of tokens."""

    num_tokens: int
    block: int
    row_blocks: int
    column_blocks: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; the last ones may be ragged."""
        num_blocks = -(-self.num_tokens // self.block)
        return -(-num_blocks // self.row_blocks), -(-num_blocks // self.column_blocks)


def count_pairs(pattern: Intervals, documents: Iterable[Span], grid: Grid) -> torch.Tensor:
    """Return how many (query, key) pairs of tokens attend in every cell, int64 of ``grid.shape``.

    Args:
        pattern: causal, every block row with its diagonal block, as a ``Layout`` has it.
        documents: each starts at a multiple of the block and has the pattern's crop to itself.
    """
    counts = torch.zeros(grid.shape, dtype=torch.int64)
    for document in documents:
        counts += _count_document(pattern, document, grid)
    return counts


def count_causal_pairs(grid: Grid) -> torch.Tensor:
    """Return how many pairs (query, key) with key <= query lie in every cell, int64 of ``grid.shape``."""
    num_blocks = -(-grid.num_tokens // grid.block)
    rows = torch.arange(num_blocks)
    triangle = union(num_blocks, [(rows, torch.zeros_like(rows), rows + 1)])
    return count_pairs(triangle, [(0, grid.num_tokens)], grid)


def seen_tokens(pattern: Intervals, block: int, document: Span, token: int) -> list[Span]:
    """Return the tokens that ``token`` of ``document`` attends to, itself included, as ranges in order."""
    first, last = document
    assert first <= token < last
    bounds = pattern.row((token - first) // block)
    return [(first + start * block, min(first + end * block, token + 1)) for start, end in bounds]


def _count_document(pattern: Intervals, document: Span, grid: Grid) -> torch.Tensor:
    first, last = document
    assert first % grid.block == 0
    assert first < last <= grid.num_tokens
    block, offset, num_blocks = grid.block, first // grid.block, -(-(last - first) // grid.block)
    heights = torch.full((num_blocks,), block)  # query tokens of a block row
    heights[-1] = last - first - (num_blocks - 1) * block
    diagonal = torch.arange(num_blocks) + offset
    cells = (diagonal // grid.row_blocks, diagonal // grid.column_blocks)
    counts = torch.zeros(grid.shape, dtype=torch.int64)
    counts.index_put_(cells, heights * (heights + 1) // 2, accumulate=True)
    for top in range(0, num_blocks, _ROWS_AT_ONCE):
        some = pattern.some_rows(top, min(top + _ROWS_AT_ONCE, num_blocks))
        rows = some.rows + top
        # Blocks before the diagonal are whole: only the last block is ragged, and only its own row sees it.
        weights = (heights * block)[rows]
        ends = torch.minimum(some.ends, rows)
        starts = torch.minimum(some.starts, ends)
        cell_rows = (rows + offset) // grid.row_blocks
        begun, ended = (_cover(cell_rows, edges + offset, weights, grid) for edges in (starts, ends))
        counts += begun - ended
    return counts


def _cover(cell_rows: torch.Tensor, edges: torch.Tensor, weights: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return what every cell holds of half-lines of blocks from ``edges`` on, ``weights`` a block."""
    num_rows, num_columns = grid.shape
    places = cell_rows * (num_columns + 1) + edges // grid.column_blocks
    size = num_rows * (num_columns + 1)
    # int64, not bincount's float64: exact whatever the length
    begun, reach = (
        torch.zeros(size, dtype=torch.int64).index_add_(0, places, values).reshape(num_rows, -1)
        for values in (weights, weights * edges)
    )
    right_edges = torch.arange(1, num_columns + 1) * grid.column_blocks
    left = right_edges * begun.cumsum(1)[:, :-1] - reach.cumsum(1)[:, :-1]  # blocks left of an edge
    return left.diff(dim=1, prepend=torch.zeros(num_rows, 1, dtype=torch.int64))
