"""The Triton kernels, run by Triton's interpreter, against the definition.

The interpreter multiplies bf16 as raw bits (3.6 to 3.9), so bf16 is left to ``tests/gpu``.
"""

import os
from typing import Any

import pytest
import torch
from adapted_models import adapt
from attention.test_cores import MODES, SCALING, run
from oracles.adapter_formula import adapted_logits, token_loss
from oracles.masked_attention import attend, batch_table, relative_error, token_table

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.attention.core import CoreAttention
from sparse_llama.attention.documents import find_documents, read_documents
from sparse_llama.attention.tiles import KeySizes, Tile, TiledLayout, Tiles
from sparse_llama.attention.triton_op import TritonCore
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.layouts import Layout, build_layout

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="interpreted here; on a GPU tests/gpu runs the kernels",
    ),
    pytest.mark.usefixtures("poisoned"),
]
SPARSE = [mode for mode, options in MODES.items() if options is not None and mode != "dense"]
TILES = {
    # packed on both sides, with the smallest bits and with the most
    "usual": Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    "unequal": Tiles(Tile(128, 32, 4, 2), Tile(32, 64, 4, 2), Tile(32, 128, 4, 2)),
}


def layout_of(mode: str, block: int, num_tokens: int, num_heads: int = 4) -> Layout:
    options = MODES[mode]
    assert options is not None
    sparsity = parse_sparsity(options | {"block": block})
    return build_layout(sparsity, num_heads=num_heads, num_blocks=max(6, -(-num_tokens // block) + 1), seed=3)


def rows_of(kind: str, num_tokens: int, block: int) -> torch.Tensor:
    """Return position ids of two rows: a document each, or the second one packed with three."""
    whole = torch.arange(num_tokens)
    if kind == "whole":
        return torch.stack([whole, whole])
    first = num_tokens // 2 // block * block or block
    return torch.stack([whole, torch.cat([whole[:first], whole[:7], whole[: num_tokens - first - 7]])])


def draw(
    num_tokens: int, num_kv_heads: int, *, width: int = 16, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Return query, key, value and the output's gradient, of 4 query heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, num_tokens, width) for heads in (4, num_kv_heads, num_kv_heads, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def check(
    layout: Layout,
    positions: torch.Tensor,
    num_kv_heads: int,
    *,
    dtype: torch.dtype = torch.float32,
    width: int = 16,
    tiles: str = "usual",
    chunk: int | None = None,
) -> None:
    """Assert that output and gradients are as near to fp64 as the definition in the same precision."""
    *inputs, grad = draw(positions.shape[1], num_kv_heads, width=width, dtype=dtype)
    table = batch_table(layout, 4, positions)
    core = TritonCore(
        TiledLayout(layout, tiles=TILES[tiles], chunk=chunk), find_documents(positions, 2), SCALING
    )
    found = run(lambda q, k, v: CoreAttention.apply(core, q, k, v), inputs, grad)
    exact = run(lambda q, k, v: attend(q, k, v, table, SCALING), [t.double() for t in inputs], grad.double())
    naive = run(lambda q, k, v: attend(q, k, v, table, SCALING), inputs, grad)
    for name, actual, same_dtype, wanted in zip(("o", "dq", "dk", "dv"), found, naive, exact, strict=True):
        # fp32 errors are all near 1e-7, where the order of sums decides; 16-bit ones are the inputs' rounding
        slack = 2.0 if dtype == torch.float32 else 1.2
        assert relative_error(actual, wanted) <= slack * relative_error(same_dtype, wanted), name


@pytest.mark.parametrize("mode", SPARSE)
def test_packed_documents_of_grouped_heads_are_the_definition(mode: str):
    check(layout_of(mode, 16, 150), rows_of("packed", 150, 16), num_kv_heads=2, chunk=1)


@pytest.mark.parametrize(
    ("mode", "block", "num_kv_heads"),
    [
        ("fixed", 32, 4),
        ("bigbird", 32, 1),
        ("bslongformer", 64, 2),
        pytest.param("fixed per head", 64, 4, marks=pytest.mark.slow),
        pytest.param("window", 128, 2, marks=pytest.mark.slow),
    ],
)
def test_larger_blocks_and_ragged_rows_are_the_definition(mode: str, block: int, num_kv_heads: int):
    num_tokens = 4 * block + 9 if block < 64 else 2 * block + 70
    check(
        layout_of(mode, block, num_tokens), rows_of("whole", num_tokens, block), num_kv_heads, tiles="unequal"
    )


@pytest.mark.parametrize(
    ("mode", "tiles"),
    [pytest.param("variable", "usual", marks=pytest.mark.slow), ("bigbird", "unequal")],
)
def test_fp16_is_the_definition_within_its_own_rounding(mode: str, tiles: str):
    check(layout_of(mode, 16, 150), rows_of("packed", 150, 16), 2, dtype=torch.float16, tiles=tiles)


@pytest.mark.parametrize("width", [64, 96, 10])
def test_heads_of_any_width_are_the_definition(width: int):
    check(layout_of("fixed", 16, 100), rows_of("whole", 100, 16), 2, width=width)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("rows", ["whole", "packed"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("mode", SPARSE)
def test_every_combination_is_the_definition(
    mode: str, block: int, num_kv_heads: int, rows: str, tiles: str, dtype: torch.dtype
):
    num_tokens = {16: 309, 32: 309, 64: 500, 128: 700}[block]
    layout = layout_of(mode, block, num_tokens)
    check(layout, rows_of(rows, num_tokens, block), num_kv_heads, dtype=dtype, tiles=tiles)


def test_the_tiles_that_would_be_chosen_are_the_definition_too():
    layout, positions = layout_of("bigbird", 16, 100), rows_of("packed", 100, 16)
    *inputs, grad = draw(100, 2)
    core = TritonCore(TiledLayout(layout), find_documents(positions, 2), SCALING)
    found = run(lambda q, k, v: CoreAttention.apply(core, q, k, v), inputs, grad)
    table = batch_table(layout, 4, positions)
    exact = run(lambda q, k, v: attend(q, k, v, table, SCALING), [t.double() for t in inputs], grad.double())
    for actual, wanted in zip(found, exact, strict=True):
        assert relative_error(actual, wanted) < 1e-6


@pytest.mark.parametrize("mode", ["fixed", "bigbird", "window"])
def test_a_token_changes_nothing_before_it_and_only_what_sees_it(mode: str):
    layout, positions = layout_of(mode, 16, 150), rows_of("packed", 150, 16)
    core = TritonCore(TiledLayout(layout, tiles=TILES["usual"]), find_documents(positions, 2), SCALING)
    query, key, value, _ = draw(150, 4)
    before, _ = core.forward(query, key, value)
    token = 37
    key, value = key.clone(), value.clone()
    key[:, :, token] += 1.0
    value[:, :, token] -= 1.0
    after, _ = core.forward(query, key, value)
    assert torch.equal((before != after).any(-1), batch_table(layout, 4, positions)[..., token])


def test_the_lse_is_the_log_of_the_denominator():
    layout, positions = layout_of("fixed", 16, 100), rows_of("packed", 100, 16)
    query, key, value, _ = draw(100, 2)
    core = TritonCore(TiledLayout(layout, tiles=TILES["usual"]), find_documents(positions, 2), SCALING)
    _, lse = core.forward(query, key, value)
    scores = SCALING * (query.double() @ key.double().repeat_interleave(2, 1).mT)
    expected = scores.masked_fill(~batch_table(layout, 4, positions), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=2e-6)


def test_cut_columns_have_the_same_bits_twice_and_the_uncut_gradient_but_for_the_order_of_sums():
    layout, positions = layout_of("bslongformer", 16, 150), rows_of("packed", 150, 16)
    *inputs, grad = draw(150, 2)

    def grads(chunk: int) -> list[torch.Tensor]:
        tiled = TiledLayout(layout, tiles=TILES["usual"], chunk=chunk)
        core = TritonCore(tiled, find_documents(positions, 2), SCALING)
        sizes = KeySizes(*tiled.launches(core.documents, inputs[0], 2).grad_key[1])
        assert (sizes.max_sums > 0) == (chunk == 1)
        return run(lambda q, k, v: CoreAttention.apply(core, q, k, v), inputs, grad)[1:]

    once, again, uncut = grads(1), grads(1), grads(100)
    for first, second, whole in zip(once, again, uncut, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-5)


def test_tokens_of_no_document_get_zeros_and_give_none():
    layout = layout_of("fixed", 16, 100)
    ids = torch.tensor([[0] * 40 + [-1] * 13 + [1] * 47, [-1] * 5 + [0] * 95])
    *inputs, grad = draw(100, 2)
    core = TritonCore(TiledLayout(layout, tiles=TILES["usual"], chunk=1), read_documents(ids), SCALING)
    padded = [tensor.masked_fill((ids < 0)[:, None, :, None], torch.nan) for tensor in inputs]
    found = run(lambda q, k, v: CoreAttention.apply(core, q, k, v), padded, grad)
    for result in found:
        assert (result.transpose(1, 2)[ids < 0] == 0).all()
    for row, first, last in ((0, 0, 40), (0, 53, 100), (1, 5, 100)):
        own = [tensor[row : row + 1, :, first:last] for tensor in (*inputs, grad)]
        table = token_table(layout, 4, last - first)
        expected = run(lambda q, k, v, table=table: attend(q, k, v, table, SCALING), own[:3], own[3])
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual[row : row + 1, :, first:last], wanted, rtol=1e-5, atol=1e-5)


def test_any_strides_give_the_same_bits():
    layout, positions = layout_of("bigbird", 16, 100), rows_of("packed", 100, 16)
    query, key, value, grad = draw(100, 2)
    core = TritonCore(TiledLayout(layout, tiles=TILES["usual"]), find_documents(positions, 2), SCALING)
    strided = (
        query.transpose(1, 2).contiguous().transpose(1, 2),  # as a projection leaves it
        torch.cat([key, value], -1)[..., :16],  # cut from a fused projection
        value.mT.contiguous().mT,  # not contiguous along D
    )
    output, lse = core.forward(query, key, value)
    found, found_lse = core.forward(*strided)
    assert torch.equal(found, output)
    assert torch.equal(found_lse, lse)
    assert found.stride() == strided[0].stride()
    delta = (grad * output).sum(-1)
    expected = core.backward(grad, query, key, value, output, lse, delta)
    again = core.backward(grad.mT.contiguous().mT, *strided, found, lse, delta.mT.contiguous().mT)
    for actual, wanted in zip(again, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_an_adapter_over_the_kernels_is_the_formula(tiny_llama: Any):
    options = {"mode": "fixed", "block": 4, "num_local_blocks": 2}
    sparsity = parse_sparsity(
        options | {"different_layout_per_head": True, "num_different_global_patterns": 2}
    )
    model: Any = adapt(tiny_llama(), "v1", sparsity=sparsity)
    for layer in model.model.layers:
        layer.self_attn.attention_plan.backend = "triton"
    ids = torch.randint(61, (2, 37), generator=torch.Generator().manual_seed(5))
    weights = {name: t.detach().double().requires_grad_() for name, t in model.state_dict().items()}
    layout = build_layout(sparsity, num_heads=4, num_blocks=16, seed=0)
    table = token_table(layout, 4, 37)
    assert 0.3 < table.sum() / (4 * 37 * 38 / 2) < 0.8
    logits = model(input_ids=ids, use_cache=False).logits
    expected = adapted_logits(weights, model.config, ids, table=table)
    rounding = 3e-5  # as in tests/adapters: fp32 through 4 layers with scores of up to 30
    assert relative_error(logits, expected) < rounding
    token_loss(logits, ids).backward()
    token_loss(expected, ids).backward()
    for name, parameter in trainable_parameters(model):
        found, wanted = parameter.grad, weights[name].grad
        assert found is not None
        assert wanted is not None
        assert relative_error(found, wanted) < rounding, name
