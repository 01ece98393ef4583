"""Which layouts begin longer ones of the same options: every longer one is built."""

import random
from typing import Any

import pytest

from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import build_layout, extends

LONGEST = 30
HEADS = 4


def options(rng: random.Random) -> dict[str, Any]:
    """Return random options of a mode."""
    per_head = rng.random() < 0.5
    local, wide = rng.choice([(1, 1), (3, 1), (4, 1), (4, 2), (6, 2), (6, 3), (8, 4)])
    indices = [rng.randint(-1, 12) for _ in range(rng.randint(1, 3))]
    direction = {"attention": rng.choice(["unidirectional", "bidirectional"])}
    horizontal = {
        "horizontal_global_attention": direction["attention"] != "unidirectional" and rng.random() < 0.4
    }
    ranges = rng.choice([{}, {"global_block_end_indices": [index + rng.randint(1, 3) for index in indices]}])
    window = {"num_sliding_window_blocks": rng.choice([1, 3, 5])}
    return rng.choice(
        [
            {"mode": "dense"},
            {"mode": "fixed", "num_local_blocks": local, "num_global_blocks": wide}
            | {"different_layout_per_head": per_head, **direction, **horizontal}
            | ({"num_different_global_patterns": rng.randint(1, local // wide)} if per_head else {}),
            {"mode": "variable", "local_window_blocks": [rng.randint(1, 4), rng.randint(1, 4)], **direction}
            | {"num_random_blocks": rng.choice([0, 0, 2]), "global_block_indices": indices}
            | {"different_layout_per_head": per_head, **horizontal, **ranges},
            {"mode": "bigbird", "num_random_blocks": rng.choice([0, 1, 3]), **window, **direction}
            | {"different_layout_per_head": per_head},
            {"mode": "bslongformer", "global_block_indices": indices, **window, **direction, **ranges},
            {"mode": "local_sliding_window", **window, **direction},
            {"mode": "strided", "stride": rng.randint(1, 9)},
            {"mode": "s2", "group_blocks": 2 * rng.randint(1, 6)},
        ]
    )


def begin_all_longer_ones(block: dict[str, Any], num_blocks: int, seed: int) -> bool:
    short = build_layout(block, HEADS, num_blocks, seed)
    return all(
        mine.equals(longer.first_rows(num_blocks))
        for length in range(num_blocks + 1, LONGEST + 1)
        for mine, longer in zip(
            short.patterns, build_layout(block, HEADS, length, seed).patterns, strict=True
        )
    )


def test_a_layout_that_is_said_to_extend_begins_every_longer_one():
    rng = random.Random(0)
    claimed: dict[str, int] = {}
    for _ in range(200):
        block, num_blocks, seed = options(rng), rng.randint(5, 24), rng.randrange(9)
        try:
            build_layout(block, HEADS, num_blocks)
        except ConfigError:
            continue
        if extends(parse_sparsity(block), num_blocks):
            assert begin_all_longer_ones(block, num_blocks, seed), (block, num_blocks)
            claimed[block["mode"]] = claimed.get(block["mode"], 0) + 1
    assert len(claimed) == 8
    assert min(claimed.values()) >= 5, claimed


UNLIKE: list[tuple[dict[str, Any], int]] = [
    (
        {"mode": "fixed", "num_local_blocks": 4, "num_global_blocks": 2}
        | {"different_layout_per_head": True, "num_different_global_patterns": 2},
        5,
    ),
    ({"mode": "fixed", "horizontal_global_attention": True}, 10),
    ({"mode": "variable", "num_random_blocks": 1}, 12),
    ({"mode": "variable", "global_block_indices": [-6]}, 12),
    ({"mode": "variable", "global_block_indices": [-5], "global_block_end_indices": [-3]}, 12),
    ({"mode": "bslongformer", "global_block_indices": [0, -2]}, 12),
    ({"mode": "bigbird", "num_random_blocks": 2}, 12),
    (
        {"mode": "bigbird", "num_random_blocks": 2, "attention": "unidirectional"}
        | {"different_layout_per_head": True},
        12,
    ),
]


@pytest.mark.parametrize(("block", "num_blocks"), UNLIKE, ids=lambda value: str(value)[:60])
def test_a_layout_that_is_said_not_to_extend_is_unlike_a_longer_one(block: dict[str, Any], num_blocks: int):
    assert not extends(parse_sparsity(block), num_blocks)
    assert not begin_all_longer_ones(block, num_blocks, seed=0)
