"""Pairs counted in cells and the tokens that a token sees, against the table of all token pairs."""

import random

import pytest
import torch

from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.layouts import Layout, build_layout
from sparse_llama.layouts.cells import Grid, Span, count_causal_pairs, count_pairs, seen_tokens

BLOCK, NUM_BLOCKS = 3, 14
MODES = [
    {"mode": "dense"},
    {"mode": "fixed", "num_local_blocks": 4, "num_global_blocks": 2},
    {"mode": "variable", "local_window_blocks": [1, 3], "global_block_indices": [0, 5]},
    {"mode": "bigbird", "num_random_blocks": 2, "different_layout_per_head": True},
    {"mode": "bslongformer", "global_block_indices": [0, 3], "global_block_end_indices": [1, 5]},
    {"mode": "local_sliding_window", "num_sliding_window_blocks": 5},
]
ROWS: list[list[Span]] = [
    [(0, 42)],
    [(0, 1)],
    [(0, 41)],
    [(0, 7), (9, 18), (18, 40)],
    [(3, 5), (30, 71)],
]
"""Documents of a row: whole, shortest, ragged, packed with and without a gap, longer than a master."""
CELLS = [(1, 1), (4, 2), (3, 5), (40, 40)]


def make(block: dict) -> Layout:
    return build_layout(parse_sparsity(block | {"block": BLOCK}), num_heads=2, num_blocks=NUM_BLOCKS, seed=3)


def token_table(blocks: torch.Tensor, documents: list[Span]) -> torch.Tensor:
    """Return the (T, T) table of a row: in each document the blocks and the triangle, outside nothing."""
    num_tokens = documents[-1][1]
    table = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    tokens = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1).tril()
    for first, last in documents:
        table[first:last, first:last] = tokens[: last - first, : last - first]
    return table


def counted(table: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the true pairs of every cell, pair by pair."""
    counts = torch.zeros(grid.shape, dtype=torch.int64)
    for query, key in table.nonzero().tolist():
        counts[query // BLOCK // grid.row_blocks, key // BLOCK // grid.column_blocks] += 1
    return counts


@pytest.mark.parametrize("documents", ROWS, ids=str)
@pytest.mark.parametrize("block", MODES, ids=lambda block: block["mode"])
def test_a_cell_holds_the_pairs_that_attend_in_it(block: dict, documents: list[Span]):
    for pattern in make(block).patterns:
        table = token_table(pattern.to_dense(), documents)
        for cells in CELLS:
            grid = Grid(documents[-1][1], BLOCK, *cells)
            assert torch.equal(count_pairs(pattern, documents, grid), counted(table, grid))


@pytest.mark.parametrize("num_tokens", [1, 3, 29, 42])
def test_full_attention_fills_every_causal_pair(num_tokens: int):
    triangle = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    for cells in CELLS:
        grid = Grid(num_tokens, BLOCK, *cells)
        assert torch.equal(count_causal_pairs(grid), counted(triangle, grid))


@pytest.mark.parametrize("documents", ROWS, ids=str)
@pytest.mark.parametrize("block", MODES, ids=lambda block: block["mode"])
def test_a_token_sees_its_row_of_the_table(block: dict, documents: list[Span]):
    for pattern in make(block).patterns:
        table = token_table(pattern.to_dense(), documents)
        for document in documents:
            for token in range(*document):
                spans = seen_tokens(pattern, BLOCK, document, token)
                seen = [key for span in spans for key in range(*span)]
                assert seen == table[token].nonzero().flatten().tolist()


def test_counts_are_exact_where_a_table_would_have_a_quarter_of_a_billion_blocks():
    """524,288 tokens, window of 5: 3 blocks a row but for the first two, the diagonal's halved."""
    block, num_blocks = 32, 16384
    layout = build_layout(
        parse_sparsity({"mode": "local_sliding_window", "block": block, "num_sliding_window_blocks": 5}),
        num_heads=1,
        num_blocks=num_blocks,
        seed=0,
    )
    num_tokens = num_blocks * block
    counts = count_pairs(layout.patterns[0], [(0, num_tokens)], Grid(num_tokens, block, 512, 256))
    whole = 2 * num_blocks - 3  # blocks before the diagonal
    assert int(counts.sum()) == whole * block**2 + num_blocks * block * (block + 1) // 2
    cell = random.Random(0).randrange(1, 32)  # every square of cells but the first has the same pairs
    assert counts[cell, 2 * cell - 1] == 3 * block**2
    assert counts.shape == (32, 64)
