"""The modes against layouts that DeepSpeed 0.19.6 computed, and against pictures."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import build_layout


def picture(block: dict, num_blocks: int, head: int = 0, num_heads: int = 4) -> list[str]:
    layout = build_layout(parse_sparsity(block), num_heads=num_heads, num_blocks=num_blocks, seed=0)
    table = layout.patterns[layout.head_patterns[head]].to_dense()
    return ["".join("#" if cell else "." for cell in row) for row in table.tolist()]


@pytest.mark.real_data
def test_every_golden_layout_is_reproduced_bit_for_bit(shared: Path):
    golden = np.load(shared / "golden" / "deepspeed_layouts.npz")
    cases = json.loads(str(golden["cases"]))
    assert len(cases) == 309
    for index, case in enumerate(cases):
        sparsity = parse_sparsity({"mode": case["mode"], "block": case["block"], **case["options"]})
        heads, blocks = case["num_heads"], case["num_blocks"]
        layout = build_layout(sparsity, heads, blocks, case["python_random_seed"])
        bits = np.unpackbits(golden[f"layout_{index}"])[: heads * blocks * blocks]
        expected = torch.from_numpy(bits).view(heads, blocks, blocks).bool()
        assert torch.equal(layout.dense(), expected), case


def test_fixed_sees_its_window_and_the_last_block_of_every_window_before():
    assert picture({"mode": "fixed", "num_local_blocks": 3, "attention": "unidirectional"}, 7) == [
        "#......",
        "##.....",
        "###....",
        "..##...",
        "..###..",
        "..####.",
        "..#..##",
    ]


def test_fixed_heads_take_turns_at_the_global_block():
    block = {
        "mode": "fixed",
        "num_local_blocks": 2,
        "different_layout_per_head": True,
        "num_different_global_patterns": 2,
    }
    assert picture(block, 4, head=0) == ["#...", "##..", ".##.", ".###"]
    assert picture(block, 4, head=1) == ["#...", "##..", "#.#.", "#.##"]
    assert picture(block, 4, head=3) == picture(block, 4, head=1)


def test_bslongformer_sees_a_window_and_the_global_block():
    assert picture({"mode": "bslongformer", "num_sliding_window_blocks": 3}, 6) == [
        "#.....",
        "##....",
        "###...",
        "#.##..",
        "#..##.",
        "#...##",
    ]


def test_a_global_block_of_bslongformer_sees_everything_before_it():
    block = {"mode": "bslongformer", "num_sliding_window_blocks": 1, "global_block_indices": [4]}
    assert picture(block, 6) == ["#.....", ".#....", "..#...", "...#..", "#####.", "....##"]


def test_variable_windows_end_with_the_last_size_repeating():
    block = {"mode": "variable", "local_window_blocks": [1, 2], "global_block_indices": [0]}
    assert picture(block, 6) == ["#.....", "##....", "###...", "#..#..", "#..##.", "#....#"]


def test_local_sliding_window_sees_half_its_size_back():
    block = {"mode": "local_sliding_window", "num_sliding_window_blocks": 5}
    assert picture(block, 5) == ["#....", "##...", "###..", ".###.", "..###"]


def test_random_blocks_are_those_of_pythons_sample():
    """Which is what DeepSpeed drew them with, row after row; up to 21 blocks and over 5 of them otherwise."""
    for count, num_blocks in ((1, 21), (1, 22), (2, 22), (3, 64), (5, 300), (6, 80), (9, 40)):
        block = {"mode": "variable", "local_window_blocks": [1], "global_block_indices": []}
        expected = torch.eye(num_blocks, dtype=torch.bool)
        rng = random.Random(count)
        for row in range(num_blocks):
            expected[row, rng.sample(range(num_blocks), count)] = True
        layout = build_layout(block | {"num_random_blocks": count}, 1, num_blocks, seed=count)
        assert torch.equal(layout.dense()[0], expected)


def test_random_blocks_repeat_with_the_seed_and_differ_between_heads_and_seeds():
    sparsity = parse_sparsity({"mode": "bigbird", "different_layout_per_head": True, "num_random_blocks": 2})
    one, same, other = (build_layout(sparsity, num_heads=3, num_blocks=20, seed=seed) for seed in (1, 1, 2))
    assert all(a.equals(b) for a, b in zip(one.patterns, same.patterns, strict=True))
    assert not any(a.equals(b) for a, b in zip(one.patterns, other.patterns, strict=True))
    assert not one.patterns[0].equals(one.patterns[1])


def test_unidirectional_bigbird_samples_what_there_is_where_deepspeed_crashed():
    sparsity = parse_sparsity({"mode": "bigbird", "num_random_blocks": 4, "attention": "unidirectional"})
    layout = build_layout(sparsity, num_heads=1, num_blocks=12, seed=0)
    assert layout.patterns[0].to_dense()[:4].tolist() == torch.ones(4, 12).tril().bool().tolist()


def test_more_random_blocks_than_blocks_are_refused():
    sparsity = parse_sparsity({"mode": "bigbird", "num_random_blocks": 9})
    with pytest.raises(
        ConfigError, match=r"num_random_blocks: 9 blocks, but the layout has 8; use at most 8"
    ):
        build_layout(sparsity, num_heads=1, num_blocks=8, seed=0)
