"""The kernel calls of the CPU core: together they cover what the layout says, once."""

import pytest
import torch
from attention.test_cores import MODES

from sparse_llama.attention.chunks import cut_into_parts
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.layouts import build_layout


def covered(parts, num_tokens: int) -> torch.Tensor:
    """Return how often each pair of tokens is computed and not masked."""
    count = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    for part in (*parts.leaves, *parts.shared):
        keys = torch.cat([torch.arange(start, end) for start, end in part.spans])
        mask = part.mask(torch.float32)
        seen = torch.ones(part.last - part.first, keys.numel(), dtype=torch.int64)
        if mask is not None:
            assert mask.shape == seen.shape
            assert set(mask.unique().tolist()) <= {0.0, -torch.inf}
            seen = (mask == 0).to(torch.int64)
        count[part.first : part.last, keys] += seen
    return count


@pytest.mark.parametrize("block", [1, 4, 16, 48, 64, 128, 200])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "full"])
def test_every_pair_that_attends_is_computed_once_and_no_other(mode, block):
    num_tokens = {1: 300, 4: 777}.get(block, 2500)
    sparsity = parse_sparsity(MODES[mode] | {"block": block})
    layout = build_layout(sparsity, num_heads=4, num_blocks=-(-num_tokens // block) + 3, seed=3)
    for pattern in layout.patterns[:2]:
        tokens = pattern.to_dense().repeat_interleave(block, 0).repeat_interleave(block, 1)
        expected = tokens[:num_tokens, :num_tokens].tril().to(torch.int64)
        parts = cut_into_parts(pattern, block, num_tokens)
        assert torch.equal(covered(parts, num_tokens), expected)
        own = torch.cat([torch.arange(part.first, part.last) for part in parts.leaves])
        assert torch.equal(own, torch.arange(num_tokens)), "every query is in one leaf"


@pytest.mark.parametrize(
    ("block", "least", "options"),
    [
        (64, 0.92, {"mode": "local_sliding_window", "num_sliding_window_blocks": 33}),
        (64, 0.92, {"mode": "fixed", "num_local_blocks": 16}),
        (128, 0.92, {"mode": "fixed", "num_local_blocks": 16}),
        (16, 0.85, {"mode": "fixed", "num_local_blocks": 4}),
        (16, 0.85, {"mode": "local_sliding_window", "num_sliding_window_blocks": 65}),
    ],
)
def test_little_is_computed_in_vain(block, least, options):
    num_tokens = 8192
    layout = build_layout(options | {"block": block}, num_heads=1, num_blocks=num_tokens // block)
    parts = cut_into_parts(layout.patterns[0], block, num_tokens)
    computed = sum((p.last - p.first) * p.num_keys for p in (*parts.leaves, *parts.shared))
    useful = layout.density * num_tokens * (num_tokens + 1) / 2
    assert useful / computed >= least


def test_a_list_is_linear_in_the_tokens():
    """Four times the tokens: four times the calls and the spans, and no more masks."""
    sizes = []
    for num_tokens in (16_384, 65_536):
        options = {"mode": "bslongformer", "block": 16, "num_sliding_window_blocks": 33}
        layout = build_layout(options, num_heads=1, num_blocks=num_tokens // 16)
        parts = cut_into_parts(layout.patterns[0], 16, num_tokens)
        calls = (*parts.leaves, *parts.shared)
        masks = {id(part.leaf) for part in parts.leaves}
        sizes.append((len(calls), sum(len(part.spans) for part in calls), len(masks)))
    assert sizes[1][0] <= 4.1 * sizes[0][0]
    assert sizes[1][1] <= 4.1 * sizes[0][1]
    assert sizes[1][2] == sizes[0][2] < 50
