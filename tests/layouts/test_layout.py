"""Density, crops, and intervals at sizes where a table would not fit."""

import random
from itertools import pairwise

import pytest
import torch

from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import Layout, build_layout
from sparse_llama.layouts.intervals import union

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
    {"mode": "strided", "stride": 3},
    {"mode": "s2", "group_blocks": 4},
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


FREE_TO_SHARE: list[dict] = [
    {"mode": "fixed", "num_local_blocks": 3},
    {"mode": "fixed", "num_local_blocks": 4, "num_global_blocks": 2, "horizontal_global_attention": True},
    {
        "mode": "fixed",
        "different_layout_per_head": True,
        "num_local_blocks": 8,
        "num_global_blocks": 2,
        "num_different_global_patterns": 4,
    },
    {"mode": "variable", "local_window_blocks": [2], "global_block_indices": [0, 3, 8, 11, 40]},
    {
        "mode": "variable",
        "local_window_blocks": [30, 5],
        "global_block_indices": [0, 2, 9, 31, 33, 35, 37],
        "num_random_blocks": 1,
        "horizontal_global_attention": True,
    },
    {"mode": "bslongformer", "global_block_indices": list(range(0, 60, 7))},
    {"mode": "strided", "stride": 4},
]


@pytest.mark.parametrize("block", FREE_TO_SHARE, ids=str)
def test_rows_that_share_intervals_are_the_same_rows(block: dict):
    layout = make(block, num_blocks=61)
    tables = layout.dense().tril()
    for head, pattern in enumerate(layout.head_patterns):
        rows = layout.patterns[pattern]
        expected = tables[head]
        assert torch.equal(rows.to_dense(), expected)
        assert torch.equal(rows.to_dense(first_row=50), expected[50:])
        assert torch.equal(rows.first_rows(37).to_dense(), expected[:37, :37])
        assert rows.row_sizes().tolist() == expected.sum(1).tolist()
        assert rows.num_blocks() == int(expected.sum())
        for index in (0, 1, 17, 60):
            seen = [block for start, end in rows.row(index) for block in range(start, end)]
            assert seen == expected[index].nonzero().flatten().tolist()
            assert all(end < start for (_, end), (start, _) in pairwise(rows.row(index))), "intervals touch"
        assert bool((rows.starts < rows.ends).all())
        is_new = torch.ones(rows.starts.numel(), dtype=torch.bool)
        is_new[1:] = rows.rows.diff() > 0
        assert bool((rows.starts[1:] > rows.ends[:-1])[~is_new[1:]].all()), (
            "intervals touch or are not sorted"
        )


@pytest.mark.parametrize("block", MODES, ids=lambda block: block["mode"])
@pytest.mark.parametrize("num_blocks", [1, 5, 13, 14])
def test_a_crop_has_the_first_rows_and_columns(block: dict, num_blocks: int):
    layout = make(block)
    crop = layout.crop(num_blocks)
    assert torch.equal(crop.dense(), layout.dense()[:, :num_blocks, :num_blocks])
    for mine, whole in zip(crop.patterns, layout.patterns, strict=True):
        assert torch.equal(mine.to_dense(), whole.to_dense()[:num_blocks, :num_blocks])
    assert crop.num_tokens == 4 * num_blocks
    assert crop.density == pytest.approx(layout.density_at(4 * num_blocks), abs=1e-15)
    assert torch.equal(crop.crop(1).dense(), layout.dense()[:, :1, :1])


def test_a_crop_larger_than_the_layout_is_refused():
    for num_blocks in (0, 15):
        with pytest.raises(
            ConfigError, match=f"crop: {num_blocks} blocks of a layout of 14; 1 to all of them"
        ):
            make(MODES[0]).crop(num_blocks)


HALF_A_MILLION: list[tuple[dict, int]] = [
    ({"mode": "dense"}, 1),
    ({"mode": "fixed"}, 1),
    ({"mode": "fixed", "horizontal_global_attention": True}, 1),
    ({"mode": "fixed", "different_layout_per_head": True, "num_different_global_patterns": 4}, 4),
    ({"mode": "variable", "num_random_blocks": 2, "global_block_indices": [0, 9]}, 1),
    ({"mode": "variable", "global_block_indices": list(range(0, 32768, 64))}, 1),
    ({"mode": "bigbird", "num_random_blocks": 3}, 1),
    ({"mode": "bslongformer", "num_sliding_window_blocks": 65}, 1),
    ({"mode": "local_sliding_window"}, 1),
    ({"mode": "strided", "stride": 2}, 1),
    ({"mode": "strided", "stride": 128}, 1),
    ({"mode": "s2", "group_blocks": 8192}, 2),
]


@pytest.mark.parametrize(("block", "num_patterns"), HALF_A_MILLION, ids=lambda value: str(value)[:60])
def test_half_a_million_tokens_take_megabytes(block: dict, num_patterns: int):
    """Counted, not timed; (H, N, N) int64 would be 256 GiB."""
    layout = build_layout(block, num_heads=32, num_blocks=524288 // 16)
    assert len(layout.patterns) == num_patterns
    drawn = [tensor for drawing in layout.drawings for rows in drawing.rows for tensor in rows]
    held = sum(tensor.numel() * tensor.element_size() for tensor in drawn)
    corners = sum(4 * 8 * len(drawing.rectangles) for drawing in layout.drawings)
    assert sum(pattern.nbytes for pattern in layout.patterns) < num_patterns * 3 * 2**20
    assert held + corners < num_patterns * 4 * 2**20
    assert 0 < layout.density <= 1
    assert layout.crop(8).dense().shape == (32, 8, 8)


def test_the_density_of_half_a_million_tokens_is_the_one_counted_by_hand():
    """``fixed``, 4 local blocks: row 4 w + r sees w blocks before its window, r of it, and itself."""
    num_blocks, block = 32768, 16
    layout = build_layout({"mode": "fixed"}, num_heads=32, num_blocks=num_blocks)
    before = sum(row // 4 + row % 4 for row in range(num_blocks))
    pairs = before * block**2 + num_blocks * block * (block + 1) // 2
    total = num_blocks * block * (num_blocks * block + 1) // 2
    assert layout.density == pytest.approx(pairs / total, rel=1e-12)
