"""Density, crops, and intervals at sizes where a table would not fit."""

import random

import pytest
import torch

from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import Layout, build_layout
from sparse_llama.layouts.intervals import Intervals, union

MODES = [
    {"mode": "dense"},
    {"mode": "fixed", "num_local_blocks": 4, "num_global_blocks": 2},
    {"mode": "fixed", "different_layout_per_head": True, "num_different_global_patterns": 4},
    {
        "mode": "variable",
        "local_window_blocks": [1, 3],
        "global_block_indices": [0, 5],
        "num_random_blocks": 1,
    },
    {"mode": "bigbird", "different_layout_per_head": True, "num_random_blocks": 1},
    {"mode": "bslongformer", "global_block_indices": [0, 3], "global_block_end_indices": [1, 5]},
    {"mode": "local_sliding_window", "num_sliding_window_blocks": 5},
]


def make(block: dict, num_blocks: int = 14) -> Layout:
    return build_layout(parse_sparsity(block | {"block": 4}), num_heads=4, num_blocks=num_blocks, seed=3)


def token_table(layout: Layout, num_tokens: int) -> torch.Tensor:
    """Return (H, T, T): the definition, written out."""
    blocks = torch.stack([layout.patterns[pattern].to_dense() for pattern in layout.head_patterns])
    tokens = blocks.repeat_interleave(layout.block, 1).repeat_interleave(layout.block, 2)
    return tokens[:, :num_tokens, :num_tokens].tril()


@pytest.mark.parametrize("block", MODES, ids=lambda block: block["mode"])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 29, 56])
def test_density_is_the_share_of_attending_pairs(block: dict, num_tokens: int):
    layout = make(block)
    table = token_table(layout, num_tokens)
    expected = int(table.sum()) / (4 * num_tokens * (num_tokens + 1) / 2)
    assert layout.density_at(num_tokens) == pytest.approx(expected, abs=1e-15)
    assert layout.is_causal_at(num_tokens) == bool(table.sum() == 4 * num_tokens * (num_tokens + 1) // 2)


def test_a_shorter_sequence_sees_the_crop_of_the_master():
    """The second pattern of ``fixed``, made anew for 5 blocks, would move its global blocks from 4 to 3."""
    block = {"mode": "fixed", "num_local_blocks": 4, "num_global_blocks": 2}
    per_head = {"different_layout_per_head": True, "num_different_global_patterns": 2}
    sparsity = parse_sparsity(block | per_head)
    master, fresh = (
        build_layout(sparsity, num_heads=2, num_blocks=num_blocks, seed=0).patterns[1]
        for num_blocks in (16, 5)
    )
    assert torch.equal(master.first_rows(5).to_dense(), master.to_dense()[:5, :5])
    assert master.to_dense()[4, :5].tolist() == [True, True, False, False, True]
    assert fresh.to_dense()[4].tolist() == [True, True, False, True, True]


def test_a_sequence_longer_than_the_master_is_refused():
    with pytest.raises(
        ConfigError, match=r"master_length: the layout is made for 56 tokens, the sequence has 57"
    ):
        make(MODES[0]).density_at(57)


def test_the_union_of_intervals_is_the_union_of_their_blocks():
    rng = random.Random(0)
    for _ in range(50):
        num_rows = rng.randint(1, 9)
        triples = [
            (rng.randrange(num_rows), rng.randrange(9), rng.randrange(10)) for _ in range(rng.randint(0, 30))
        ]
        expected = torch.zeros(num_rows, 9, dtype=torch.bool)
        for row, start, end in triples:
            expected[row, start:end] = True
        table = torch.tensor(triples, dtype=torch.int64).reshape(-1, 3)
        merged = union(num_rows, [(table[:, 0], table[:, 1], table[:, 2])])
        found = torch.zeros(num_rows, 9, dtype=torch.bool)
        for row, start, end in zip(merged.rows, merged.starts, merged.ends, strict=True):
            assert not found[row, max(int(start) - 1, 0) : end].any(), "intervals touch"
            found[row, start:end] = True
        assert torch.equal(found, expected)


def test_half_a_million_tokens_take_megabytes():
    sparsity = parse_sparsity({"mode": "bslongformer", "num_sliding_window_blocks": 65})
    layout = build_layout(sparsity, num_heads=32, num_blocks=524288 // 16, seed=0)
    sizes = [t.numel() * t.element_size() for t in _tensors(layout.patterns[0])]
    assert len(layout.patterns) == 1
    assert sum(sizes) < 2 * 2**20


def _tensors(intervals: Intervals) -> list[torch.Tensor]:
    return [intervals.row_starts, intervals.starts, intervals.ends]
