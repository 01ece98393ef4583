"""``block_sparse_attention`` as somebody calls it who has tensors and a layout, and nothing else of ours."""

import subprocess
import sys

import pytest
import torch
from oracles.masked_attention import attend, batch_table, relative_error, token_table

from sparse_llama.attention import block_sparse_attention
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import build_layout

BLOCK = {"mode": "bslongformer", "block": 16, "num_sliding_window_blocks": 3, "attention": "unidirectional"}
TOKENS = 200


def draw(num_kv_heads: int = 2, num_rows: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_rows, heads, TOKENS, 8) for heads in (4, num_kv_heads, num_kv_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def test_ten_lines_need_neither_transformers_nor_deepspeed():
    program = """
import sys, torch
from sparse_llama.attention import block_sparse_attention
from sparse_llama.layouts import build_layout
layout = build_layout({"mode": "fixed", "block": 16}, num_heads=4, num_blocks=8)
q, k, v = (torch.randn(1, heads, 128, 32, requires_grad=True) for heads in (4, 2, 2))
block_sparse_attention(q, k, v, layout).sum().backward()
print(layout.density, q.grad.shape, k.grad.shape, v.grad.shape)
assert not {"transformers", "deepspeed", "datasets", "triton"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_output_and_its_gradients_are_those_of_a_dense_mask(backend, scale):
    layout = build_layout(BLOCK, 4, 16)
    inputs = draw()
    table = token_table(layout, 4, TOKENS)
    assert table.sum() < 0.5 * 4 * TOKENS * (TOKENS + 1) / 2
    found = block_sparse_attention(*inputs, layout, scale, backend=backend)
    expected = attend(*inputs, table, 8**-0.5 if scale is None else scale)
    grad = torch.randn_like(expected)
    pairs = zip(
        [found, *torch.autograd.grad(found, inputs, grad)],
        [expected, *torch.autograd.grad(expected, inputs, grad)],
        strict=True,
    )
    for actual, wanted in pairs:
        assert relative_error(actual, wanted) < 1e-13


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_documents_have_layouts_of_their_own_and_padding_is_nothing(backend):
    """Rows: two documents and padding at the end; padding, a document that starts off the grid, padding."""
    layout = build_layout(BLOCK, 4, 16)
    documents = torch.full((2, TOKENS), -1)
    documents[0, :96], documents[0, 96:180] = 0, 1
    documents[1, 37:190] = 4
    inputs = draw()
    grad = torch.randn(2, 4, TOKENS, 8, dtype=torch.float64)
    found = block_sparse_attention(*inputs, layout, documents=documents, backend=backend)
    grads = torch.autograd.grad(found, inputs, grad)
    assert not found[documents.eq(-1)[:, None].expand(-1, 4, -1)].any()
    for actual in grads:
        assert not actual[documents.eq(-1)[:, None].expand(-1, actual.shape[1], -1)].any()
    for row, first, last in ((0, 0, 96), (0, 96, 180), (1, 37, 190)):
        alone = [t.detach()[row : row + 1, :, first:last].clone().requires_grad_() for t in inputs]
        table = token_table(layout, 4, last - first)
        expected = attend(*alone, table, 8**-0.5)
        assert relative_error(found[row, :, first:last], expected[0]) < 1e-13
        wanted = torch.autograd.grad(expected, alone, grad[row : row + 1, :, first:last])
        for actual, one in zip(grads, wanted, strict=True):
            assert relative_error(actual[row, :, first:last], one[0]) < 1e-13


def test_document_numbers_and_positions_describe_the_same_documents():
    layout = build_layout(BLOCK, 4, 16)
    numbers = torch.arange(TOKENS).expand(2, -1) // 64
    positions = torch.arange(TOKENS).expand(2, -1) % 64
    inputs = draw()
    found = block_sparse_attention(*inputs, layout, documents=numbers)
    expected = attend(*inputs, batch_table(layout, 4, positions), 8**-0.5)
    assert relative_error(found, expected) < 1e-13


def test_gradients_are_those_of_finite_differences():
    layout = build_layout({"mode": "local_sliding_window", "block": 4, "num_sliding_window_blocks": 2}, 2, 5)
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(1, heads, 18, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (2, 1, 1)
    ]
    assert torch.autograd.gradcheck(lambda q, k, v: block_sparse_attention(q, k, v, layout), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda q, k, v: (q[0], k[0], v[0]),
            r"must be \(batch, heads, tokens, head width\), got q \(4, 200, 8\)",
        ),
        (lambda q, k, v: (q, k[:, :, :9], v[:, :, :9]), "batch, tokens and head width must agree"),
        (lambda q, k, v: (q, k, v[:, :1]), "batch, tokens and head width must agree"),
        (lambda q, k, v: (q[:, :3], k, v), "query heads must be a multiple of key/value heads"),
        (lambda q, k, v: (q[:, :2], k, v), "layout: made for 4 heads, q has 2"),
        (lambda q, k, v: (q, k.float(), v), "dtype and device must agree"),
    ],
)
def test_shapes_that_do_not_belong_together_are_one_line(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        block_sparse_attention(*change(*draw()), build_layout(BLOCK, 4, 16))
    assert "\n" not in str(caught.value)


def test_a_layout_that_is_too_short_is_refused_for_the_longest_document_only():
    layout = build_layout(BLOCK, 4, 8)
    with pytest.raises(ConfigError, match="made for 128 tokens, the sequence has 200"):
        block_sparse_attention(*draw(), layout)
    block_sparse_attention(*draw(), layout, documents=torch.arange(TOKENS).expand(2, -1) // 128)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (torch.zeros(2, 7, dtype=torch.int64), r"shape \(2, 7\), but q has 2 rows of 200 tokens"),
        (torch.zeros(2, TOKENS), "must be .B, T. integers, got torch.float32"),
        (torch.full((2, TOKENS), -3), "-3 is no document; count from 0, -1 is padding"),
    ],
)
def test_documents_that_are_none_are_one_line(documents, message):
    with pytest.raises(ConfigError, match=message):
        block_sparse_attention(*draw(), build_layout(BLOCK, 4, 16), documents=documents)


@pytest.mark.parametrize(("backend", "message"), [("flex", "no backward pass on the CPU")])
def test_a_backend_of_another_device_is_refused(backend, message):
    with pytest.raises(ConfigError, match=message):
        block_sparse_attention(*draw(), build_layout(BLOCK, 4, 16), backend=backend)


def test_the_kernels_tables_are_made_once_for_a_layout():
    layout = build_layout(BLOCK, 4, 16)
    block_sparse_attention(*draw(), layout)
    made = dict(layout.derived)
    block_sparse_attention(*draw(), layout)
    assert made
    assert all(layout.derived[kind] is one for kind, one in made.items())
