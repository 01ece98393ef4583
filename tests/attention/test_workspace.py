"""What kernels are declared to allocate is what they allocate, by the allocator's own events."""

from typing import Any

import pytest
import torch
from allocator_events import peak_bytes, result_bytes

from sparse_llama.attention import workspace
from sparse_llama.attention.dispatch import make_core
from sparse_llama.attention.documents import whole_rows
from sparse_llama.attention.tables_size import KernelSizes, kernel_sizes
from sparse_llama.attention.tiles import TiledLayout
from sparse_llama.attention.workspace import OPERATOR_WORKSPACES, AllocationCore
from sparse_llama.layouts import build_layout
from sparse_llama.planning.phases import cut_into_phases, size_of
from sparse_llama.planning.tracker import MemoryTracker

aten: Any = torch.ops.aten
FIXED = {"mode": "fixed", "num_local_blocks": 4, "num_global_blocks": 1, "attention": "unidirectional"}
BIGBIRD = {
    "mode": "bigbird",
    "num_random_blocks": 1,
    "num_sliding_window_blocks": 3,
    "num_global_blocks": 1,
    "attention": "unidirectional",
}


def heads(num_heads: int, num_tokens: int, width: int, dtype: torch.dtype, *, first: bool) -> torch.Tensor:
    """Return (1, H, T, D), laid out as (1, T, H, D) where tokens come ``first``."""
    if first:
        return torch.randn(1, num_tokens, num_heads, width).to(dtype).transpose(1, 2)
    return torch.randn(1, num_heads, num_tokens, width).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [48, 500, 2048])
@pytest.mark.parametrize("first", [True, False])
def test_flash_on_the_cpu(dtype, num_tokens, first):
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    query, key, value, grad = (heads(4, num_tokens, 64, dtype, first=first) for _ in range(4))
    inputs = (query, key, value, 0.0, True)
    output, lse = forward(*inputs)
    saved = (grad, query, key, value, output, lse, 0.0, True)
    for operation, arguments in ((forward, inputs), (backward, saved)):
        results = operation(*arguments)
        measured = peak_bytes(lambda op=operation, given=arguments: op(*given)) - result_bytes(results)
        declared = OPERATOR_WORKSPACES[operation.default](*arguments)
        # oneDNN's scratch for products of 16-bit tiles is not declared: a tile more, whatever the length
        slack = 0 if dtype == torch.float32 else 512 * 1024
        assert declared <= measured <= declared + slack, (operation, num_tokens)


def planned_peak(core: AllocationCore, tensors: list[torch.Tensor]) -> int:
    """Return what a core's backward pass has allocated at once, to the byte."""
    tracker = MemoryTracker({"meta": "host"}, {}, None)
    with tracker:
        tracker.journal.begin("backward")
        kept = core.backward(*tensors)
    del kept
    (phase,) = cut_into_phases(tracker.journal)
    return size_of(phase.peaks["host"], "host")


@pytest.mark.parametrize(("num_kv_heads", "per_head"), [(4, False), (2, True)])
def test_what_the_triton_kernels_allocate(num_kv_heads, per_head, monkeypatch):
    """The real kernels, in Triton's interpreter, with fewer key/value heads and with a pattern per head."""
    from sparse_llama.attention.triton_op import TritonCore

    block = BIGBIRD | {"block": 16, "different_layout_per_head": per_head}
    layout, documents = build_layout(block, 4, 8), whole_rows(1, 128)
    query, grad = (torch.randn(1, 4, 128, 16) for _ in range(2))
    key, value = (torch.randn(1, num_kv_heads, 128, 16) for _ in range(2))
    tiled = TiledLayout(layout)
    core = TritonCore(tiled, documents, 0.25)
    output, lse = core.forward(query, key, value)  # and makes the tables
    delta = torch.randn(1, 4, 128)
    core.backward(grad, query, key, value, output, lse, delta)

    def real() -> object:
        return core.backward(grad, query, key, value, output, lse, delta)

    planned = AllocationCore("triton", layout, documents)
    sizes = kernel_sizes(layout, documents, 16, torch.float32, num_kv_heads)
    *_, number, each, _, keys, _, _, _, _ = tiled.launches(documents, query, num_kv_heads).grad_key[1]
    assert sizes.num_heads_each == each
    # The interpreter's tiles are not a GPU's: what there is of partial sums differs, and nothing else.
    monkeypatch.setattr(workspace, "kernel_sizes", lambda *_: KernelSizes(0, number, each, keys))
    on_meta = [tensor.to("meta") for tensor in (grad, query, key, value, output, lse, delta)]
    assert planned_peak(planned, on_meta) == pytest.approx(peak_bytes(real), rel=0.01)


@pytest.mark.parametrize("block", [FIXED | {"block": 16}, BIGBIRD | {"block": 16}])
def test_tables_of_a_long_layout_from_a_part_of_it(block, monkeypatch):
    """Beyond 1,024 blocks they are scaled from a part: here a part of 128 against all of 512."""
    from sparse_llama.attention import tables_size

    documents = whole_rows(1, 8192)
    exact = kernel_sizes(build_layout(block, 4, 512), documents, 128, torch.bfloat16, 4)
    monkeypatch.setattr(tables_size, "_LARGEST", 128)
    scaled = kernel_sizes(build_layout(block, 4, 512), documents, 128, torch.bfloat16, 4)
    assert exact.table_bytes * 0.9 <= scaled.table_bytes <= exact.table_bytes * 2
    assert scaled.num_heads_each == exact.num_heads_each
    assert scaled.max_slots >= exact.max_slots


def test_meta_stands_for_a_gpu():
    """Dense 16-bit attention runs PyTorch's own code for shapes; what cannot run there allocates."""
    documents = whole_rows(1, 256)
    layout = build_layout(FIXED | {"block": 16}, 4, 16)
    query = torch.empty(1, 4, 256, 64, dtype=torch.bfloat16, device="meta")
    assert not isinstance(make_core(None, documents, query, scaling=1.0), AllocationCore)
    sparse = make_core(layout, documents, query, scaling=1.0)
    assert isinstance(sparse, AllocationCore)
    assert sparse.kernel == "triton"
    dense = make_core(None, documents, query.float(), scaling=1.0)
    assert isinstance(dense, AllocationCore)
    assert dense.kernel == "efficient"
