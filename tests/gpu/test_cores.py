"""The CUDA cores against the definition: run with ``pytest -m gpu`` on a machine that has one."""

from typing import Any

import pytest
import torch
from attention.test_cores import MODES, ROWS, TOKENS, make_layout, run
from oracles.masked_attention import attend, batch_table, relative_error

from sparse_llama.attention.blockwise import BlockwiseCore
from sparse_llama.attention.core import AttentionCore, CoreAttention
from sparse_llama.attention.documents import Documents, find_documents, read_documents, whole_rows
from sparse_llama.attention.flex import FlexCore, block_mask
from sparse_llama.attention.tiles import TiledLayout
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.layouts import Layout, build_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPARSE = [mode for mode in MODES if mode not in ("full", "dense")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def dense(layout: Layout | None, documents: Documents, scaling: float) -> AttentionCore:
    return BlockwiseCore(None, documents, scaling)


def flex(layout: Layout | None, documents: Documents, scaling: float) -> AttentionCore:
    assert layout is not None
    return FlexCore(block_mask(layout, documents, torch.device("cuda")), scaling)


def triton(layout: Layout | None, documents: Documents, scaling: float, **options: Any) -> AttentionCore:
    from sparse_llama.attention.triton_op import TritonCore

    assert layout is not None
    return TritonCore(TiledLayout(layout, **options), documents, scaling)


def draw(
    num_kv_heads: int, dtype: torch.dtype, width: int = 64, num_tokens: int = TOKENS
) -> list[torch.Tensor]:
    """Return query, key, value and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, num_tokens, width) for heads in (4, num_kv_heads, num_kv_heads, 4)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


def run_core(core: AttentionCore, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    return run(lambda q, k, v: CoreAttention.apply(core, q, k, v), inputs, grad)


def check(
    make_core: Any, mode: str, *, num_kv_heads: int, dtype: torch.dtype, width: int = 64, block: int = 16
) -> None:
    """Assert that output and gradients are as near to fp64 as the definition in the same precision."""
    layout, positions, scaling = make_layout(mode, block), ROWS["packed"], width**-0.5
    table = batch_table(layout, 4, positions).cuda()
    *inputs, grad = draw(num_kv_heads, dtype, width)
    core = make_core(layout, find_documents(positions, 2), scaling)
    exact = run(lambda q, k, v: attend(q, k, v, table, scaling), [t.double() for t in inputs], grad.double())
    naive = run(lambda q, k, v: attend(q, k, v, table, scaling), inputs, grad)
    found = run_core(core, inputs, grad)
    for name, actual, same_dtype, wanted in zip(("o", "dq", "dk", "dv"), found, naive, exact, strict=True):
        slack = 2.0 if dtype == torch.float32 else 1.2
        assert relative_error(actual, wanted) <= slack * relative_error(same_dtype, wanted), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_full_attention_is_as_near_to_fp64_as_the_definition_in_its_own_precision(num_kv_heads, dtype):
    check(dense, "full", num_kv_heads=num_kv_heads, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("mode", SPARSE)
def test_flex_is_as_near_to_fp64_as_the_definition_in_its_own_precision(mode, num_kv_heads, dtype):
    check(flex, mode, num_kv_heads=num_kv_heads, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("mode", SPARSE)
def test_triton_is_as_near_to_fp64_as_the_definition_in_its_own_precision(mode, block, num_kv_heads, dtype):
    check(triton, mode, block=block, num_kv_heads=num_kv_heads, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 80, 96, 128, 256])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_triton_takes_heads_of_any_width(block, width, dtype):
    check(triton, "bigbird", block=block, num_kv_heads=2, dtype=dtype, width=width)


@pytest.mark.parametrize("mode", SPARSE)
def test_a_token_changes_nothing_before_it_and_only_what_sees_it(mode):
    layout = make_layout(mode)
    query, key, value, _ = draw(4, torch.bfloat16)
    core = triton(layout, whole_rows(2, TOKENS), 0.125)
    before, _ = core.forward(query, key, value)
    token = 100
    key, value = key.clone(), value.clone()
    key[:, :, token] += 1.0
    value[:, :, token] -= 1.0
    after, _ = core.forward(query, key, value)
    has_changed = (before != after).any(-1)
    sees = batch_table(layout, 4, torch.arange(TOKENS).expand(2, -1)).cuda()[..., token]
    assert not (has_changed & ~sees).any()
    assert has_changed.sum() > 0.9 * sees.sum()  # bf16 may round a small change away


def test_tokens_of_no_document_get_zeros_whatever_the_memory_held():
    ids = torch.full((2, TOKENS), -1)
    ids[0, 40:200], ids[1, :16], ids[1, 30:] = 0, 0, 1
    *inputs, grad = draw(2, torch.bfloat16)
    padded = [tensor.masked_fill((ids < 0).cuda()[:, None, :, None], torch.nan) for tensor in inputs]
    core = triton(make_layout("fixed"), read_documents(ids), 0.125)
    for result in run_core(core, padded, grad):
        assert result.isfinite().all()
        assert (result.transpose(1, 2)[ids.cuda() < 0] == 0).all()


@pytest.mark.parametrize("chunk", [None, 1])
def test_gradients_have_the_same_bits_twice(chunk):
    options = {"mode": "bslongformer", "block": 64, "global_block_indices": [0]}
    layout = build_layout(parse_sparsity(options), num_heads=4, num_blocks=64, seed=0)
    *inputs, grad = draw(1, torch.bfloat16, num_tokens=4096)
    core = triton(layout, whole_rows(2, 4096), 0.125, chunk=chunk)
    once, again = (run_core(core, inputs, grad) for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(once, again, strict=True))


@pytest.mark.parametrize("mode", SPARSE)
def test_triton_and_flex_agree_at_a_length_that_no_table_of_tokens_fits(mode):
    num_tokens = 16384
    options = MODES[mode]
    assert options is not None
    sparsity = parse_sparsity(options | {"block": 128})
    layout = build_layout(sparsity, num_heads=4, num_blocks=num_tokens // 128, seed=3)
    *inputs, grad = draw(2, torch.bfloat16, num_tokens=num_tokens)
    documents = whole_rows(2, num_tokens)
    ours, theirs = (run_core(make(layout, documents, 0.125), inputs, grad) for make in (triton, flex))
    for name, actual, wanted in zip(("o", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert relative_error(actual, wanted) < 0.01, name
