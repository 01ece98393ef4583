"""Every core against the definition in fp64: outputs and gradients, every mode, packed and ragged."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles.masked_attention import attend, batch_table, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_llama.attention.blockwise import BlockwiseCore, ChunkedLayout
from sparse_llama.attention.core import AttentionCore, CoreAttention
from sparse_llama.attention.documents import find_documents, whole_rows
from sparse_llama.attention.reference import ReferenceCore
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.layouts import Layout, build_layout

MODES: dict[str, dict[str, Any] | None] = {
    "full": None,
    "dense": {"mode": "dense"},
    "fixed": {"mode": "fixed", "num_local_blocks": 6},
    "fixed per head": {
        "mode": "fixed",
        "different_layout_per_head": True,
        "num_different_global_patterns": 4,
    },
    "fixed, heads by turns": {
        "mode": "fixed",
        "num_local_blocks": 4,
        "different_layout_per_head": True,
        "num_different_global_patterns": 2,
    },
    "variable": {
        "mode": "variable",
        "local_window_blocks": [1, 3],
        "global_block_indices": [0, 5],
        "num_random_blocks": 1,
    },
    "bigbird": {"mode": "bigbird", "different_layout_per_head": True, "num_random_blocks": 1},
    "bslongformer": {
        "mode": "bslongformer",
        "global_block_indices": [0, 3],
        "global_block_end_indices": [1, 5],
    },
    "window": {"mode": "local_sliding_window", "num_sliding_window_blocks": 5},
}
TOKENS, SCALING = 309, 0.3
ROWS = {
    "one document a row": torch.arange(TOKENS).expand(2, -1),
    "packed": torch.stack(
        [torch.arange(TOKENS), torch.cat([torch.arange(176), torch.arange(16), torch.arange(TOKENS - 192)])]
    ),
}


def make_layout(mode: str, block: int = 16) -> Layout | None:
    options = MODES[mode]
    if options is None:
        return None
    sparsity = parse_sparsity(options | {"block": block})
    return build_layout(sparsity, num_heads=4, num_blocks=-(-TOKENS // block) + 3, seed=3)


def blockwise(layout: Layout | None, rows: torch.Tensor) -> AttentionCore:
    chunked = None if layout is None else ChunkedLayout(layout)
    return BlockwiseCore(chunked, find_documents(rows, 2), SCALING)


def reference(layout: Layout | None, rows: torch.Tensor) -> AttentionCore:
    return ReferenceCore(layout, find_documents(rows, 2), SCALING)


def draw(
    num_kv_heads: int, dtype: torch.dtype = torch.float64, num_tokens: int = TOKENS
) -> list[torch.Tensor]:
    """Return query, key, value and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, num_tokens, 8) for heads in (4, num_kv_heads, num_kv_heads, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    """Return the output and the gradients of query, key and value."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("make_core", [reference, blockwise])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mode", MODES)
def test_a_core_is_the_definition(make_core: Any, rows: str, num_kv_heads: int, mode: str):
    layout, positions = make_layout(mode), ROWS[rows]
    table = batch_table(layout, 4, positions)
    if mode not in ("full", "dense"):
        assert table[0].sum() < 0.5 * 4 * TOKENS * (TOKENS + 1) / 2, (
            "a nearly full layout would prove nothing"
        )
    *inputs, grad = draw(num_kv_heads)
    core = make_core(layout, positions)
    found = run(lambda q, k, v: CoreAttention.apply(core, q, k, v), inputs, grad)
    expected = run(lambda q, k, v: attend(q, k, v, table, SCALING), inputs, grad)
    for actual, wanted in zip(found, expected, strict=True):
        assert relative_error(actual, wanted) < 1e-13


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("block", "num_kv_heads"), [(32, 4), (64, 2), (128, 2)])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("full", "dense")])
def test_blockwise_is_the_definition_in_larger_blocks(mode: str, block: int, num_kv_heads: int):
    """Ten blocks and a ragged one, of which a packed row makes documents of 5, 1 and what is left."""
    num_tokens = 10 * block + 21
    bounds = (0, 5 * block, 6 * block, num_tokens)
    packed = torch.cat([torch.arange(last - first) for first, last in itertools.pairwise(bounds)])
    positions = torch.stack([torch.arange(num_tokens), packed])
    sparsity = parse_sparsity(MODES[mode] | {"block": block})  # type: ignore[operator]
    layout = build_layout(sparsity, num_heads=4, num_blocks=14, seed=3)
    table = batch_table(layout, 4, positions)
    *inputs, grad = draw(num_kv_heads, num_tokens=num_tokens)
    core = blockwise(layout, positions)
    found = run(lambda q, k, v: CoreAttention.apply(core, q, k, v), inputs, grad)
    expected = run(lambda q, k, v: attend(q, k, v, table, SCALING), inputs, grad)
    for actual, wanted in zip(found, expected, strict=True):
        assert relative_error(actual, wanted) < 1e-13


@pytest.mark.parametrize("block", [1, 5, 32, 64, 200])
def test_blockwise_takes_any_block_size(block: int):
    layout = make_layout("window", block)
    positions = torch.arange(TOKENS).expand(2, -1)
    *inputs, grad = draw(4)
    core = blockwise(layout, positions)
    found = run(lambda q, k, v: CoreAttention.apply(core, q, k, v), inputs, grad)
    expected = run(lambda q, k, v: attend(q, k, v, batch_table(layout, 4, positions), SCALING), inputs, grad)
    for actual, wanted in zip(found, expected, strict=True):
        assert relative_error(actual, wanted) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["full", "fixed", "fixed, heads by turns", "bigbird", "bslongformer"])
def test_blockwise_is_as_near_to_fp64_as_the_definition_in_its_own_precision(dtype: torch.dtype, mode: str):
    layout, positions = make_layout(mode), ROWS["packed"]
    table = batch_table(layout, 4, positions)
    *inputs, grad = draw(2, dtype)
    exact = run(lambda q, k, v: attend(q, k, v, table, SCALING), [t.double() for t in inputs], grad.double())
    naive = run(lambda q, k, v: attend(q, k, v, table, SCALING), inputs, grad)
    core = blockwise(layout, positions)
    found = run(lambda q, k, v: CoreAttention.apply(core, q, k, v), inputs, grad)
    for name, actual, same_dtype, wanted in zip(("o", "dq", "dk", "dv"), found, naive, exact, strict=True):
        allowed = relative_error(same_dtype, wanted)
        # fp32 errors are all near 1e-7, where the order of sums decides; 16-bit ones are the inputs' rounding
        slack = 2.0 if dtype == torch.float32 else 1.2
        assert relative_error(actual, wanted) <= slack * allowed, name


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("full", "dense")])
def test_a_token_changes_nothing_before_it_and_only_what_sees_it(mode: str):
    """T21: perturb token t; rows before t are equal to the bit, rows that do not see it too."""
    layout, positions = make_layout(mode), torch.arange(TOKENS).expand(2, -1)
    table = batch_table(layout, 4, positions)
    query, key, value, _ = draw(4, torch.float32)
    core = blockwise(layout, positions)
    before, _ = core.forward(query, key, value)
    token = 100
    key, value = key.clone(), value.clone()
    key[:, :, token] += 1.0
    value[:, :, token] -= 1.0
    after, _ = core.forward(query, key, value)
    has_changed = (before != after).any(-1)  # (B, H, T)
    assert not has_changed[:, :, :token].any()
    assert torch.equal(has_changed, table[..., token])


class _Allocations(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.max_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.max_elements = max(self.max_elements, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("mode", ["fixed", "bigbird", "bslongformer", "window"])
def test_blockwise_keeps_five_tensors_and_makes_none_that_is_quadratic(mode: str):
    num_tokens = 4096
    sparsity = parse_sparsity(MODES[mode] | {"block": 32})
    layout = build_layout(sparsity, num_heads=4, num_blocks=num_tokens // 32, seed=3)
    core = BlockwiseCore(ChunkedLayout(layout), whole_rows(1, num_tokens), SCALING)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 4, num_tokens, 8, generator=generator, requires_grad=True) for _ in range(3)]
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        output = CoreAttention.apply(core, *inputs)
    assert sorted(kept) == sorted([*(t.shape for t in inputs), output.shape, output.shape[:-1]])
    with torch.no_grad(), _Allocations() as seen:
        core_output, lse = core.forward(*inputs)
        core.backward(output, *inputs, core_output, lse, lse)
    assert seen.max_elements <= 2 * inputs[0].numel()  # 1/128 of T x T x H
