"""Declared allocations against the CUDA allocator's: run with ``pytest -m gpu`` on a machine that has one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_llama.attention.core import AttentionCore, row_products
from sparse_llama.attention.dispatch import make_core
from sparse_llama.attention.documents import whole_rows
from sparse_llama.attention.tables_size import kernel_sizes
from sparse_llama.attention.workspace import OPERATOR_WORKSPACES
from sparse_llama.layouts import build_layout
from sparse_llama.planning.phases import cut_into_phases, size_of
from sparse_llama.planning.tracker import MemoryTracker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FIXED = {
    "mode": "fixed",
    "block": 64,
    "num_local_blocks": 4,
    "num_global_blocks": 1,
    "attention": "unidirectional",
}
BIGBIRD = {
    "mode": "bigbird",
    "block": 64,
    "num_random_blocks": 1,
    "num_sliding_window_blocks": 3,
    "num_global_blocks": 1,
    "attention": "unidirectional",
    "different_layout_per_head": True,
}
TOKENS = 8192


def measured(call: Callable[[], object]) -> int:
    """Return the most that ``call`` adds at once; it has run before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def planned(call: Callable[[], object]) -> int:
    tracker = MemoryTracker({"meta": "gpu"}, OPERATOR_WORKSPACES, None)
    with tracker:
        tracker.journal.begin("call")
        kept = call()
    del kept
    (phase,) = cut_into_phases(tracker.journal)
    return size_of(phase.peaks["gpu"], "gpu")


def heads(num_heads: int, dtype: torch.dtype, *, is_tokens_first: bool) -> torch.Tensor:
    if is_tokens_first:
        return torch.randn(1, TOKENS, num_heads, 128, device="cuda").to(dtype).transpose(1, 2)
    return torch.randn(1, num_heads, TOKENS, 128, device="cuda").to(dtype)


def like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@pytest.mark.parametrize("is_tokens_first", [True, False])
@pytest.mark.parametrize("num_kv_heads", [8, 2])
@pytest.mark.parametrize(
    ("block", "dtype", "backend"),
    [
        (None, torch.bfloat16, "auto"),
        (None, torch.float32, "auto"),
        (FIXED, torch.bfloat16, "auto"),
        (BIGBIRD, torch.bfloat16, "auto"),
        (FIXED, torch.bfloat16, "flex"),
    ],
    ids=["flash", "efficient", "triton", "triton, a pattern per head", "flex"],
)
def test_what_an_attention_core_allocates(block, dtype, backend, num_kv_heads, is_tokens_first):
    """Memory trap 16: a plan is as good as what the kernels are declared to take; within 3% and 1 MiB."""
    layout = None if block is None else build_layout(block, 8, TOKENS // 64)
    documents = whole_rows(1, TOKENS)
    query, grad = (heads(8, dtype, is_tokens_first=is_tokens_first) for _ in range(2))
    key, value = (heads(num_kv_heads, dtype, is_tokens_first=is_tokens_first) for _ in range(2))

    def core_for(tensor: torch.Tensor) -> AttentionCore:
        return make_core(layout, documents, tensor, scaling=0.1, backend=backend)

    def steps(core: AttentionCore, *inputs: torch.Tensor) -> tuple[Any, Any]:
        query, key, value, grad = inputs
        output, lse = core.forward(query, key, value)
        delta = row_products(grad, output)
        return (
            lambda: core.forward(query, key, value),
            lambda: core.backward(grad, query, key, value, output, lse, delta),
        )

    if layout is not None:
        kernel_sizes(layout, documents, 128, dtype, num_kv_heads)  # reads data, of which there is none below
    real = steps(core_for(query), query, key, value, grad)
    given = [like(tensor) for tensor in (query, key, value, grad)]
    fake = steps(core_for(given[0]), *given)
    for name, on_gpu, on_meta in zip(("forward", "backward"), real, fake, strict=True):
        assert planned(on_meta) == pytest.approx(measured(on_gpu), rel=0.03, abs=2**20), name
