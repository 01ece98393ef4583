"""What attention kernels allocate, for planning a run without its device or its data.

Two things a planner cannot see by running code on tensors without data:

* what a kernel takes and gives back inside one operation (``OPERATOR_WORKSPACES``);
* kernels that do not run there at all: Triton's and FlexAttention's need a GPU, and PyTorch's choice of a
  kernel for fp32 falls back to T x T tables (``AllocationCore``).

Each figure is declared beside the source it is read from, and checked on a GPU by a test
(``tests/gpu/test_workspace.py``).

``B`` batch, ``T`` tokens, ``H`` query heads, ``K`` key/value heads, ``D`` head width.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sparse_llama.attention.core import Gradients, expand_heads, sum_heads
from sparse_llama.attention.documents import Documents
from sparse_llama.attention.tables_size import kernel_sizes
from sparse_llama.layouts import Layout

aten: Any = torch.ops.aten
Kernel = Literal["triton", "flex", "efficient"]


def flash_backward_bytes(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    *_: Any,
    **__: Any,
) -> int:
    """Return what FlashAttention 2's backward pass takes beside its three gradients.

    An fp32 gradient of the queries and a row sum, both rounded up, and with fewer key/value heads a gradient
    of each for every query head (PyTorch 2.13, ``transformers/cuda/flash_attn/flash_api.cpp``, ``mha_bwd``);
    copies of what is not laid out (B, T, H, D) (``cuda/attention_backward.cu``).
    """
    num_rows, num_heads, num_tokens, width = query.shape
    padded = _round_up(width, 32) if width <= 192 else 256
    num_bytes = 4 * num_rows * num_heads * _round_up(num_tokens, 128) * (padded + 1)
    if key.shape[1] != num_heads:
        num_bytes += 2 * num_rows * num_heads * key.shape[2] * width * key.element_size()
    return num_bytes + sum(tensor.nbytes for tensor in (grad, output) if not _is_tokens_first(tensor))


def cpu_flash_bytes(query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    """Return a thread's tile of scores, its statistics and its output, for all threads
    (``cpu/FlashAttentionKernel.cpp``, ``cpu_flash_attention``)."""
    rows, columns = _cpu_tile(query, key)
    num_bytes = 4 * rows * (columns + 2 + query.shape[3])
    if query.element_size() == 2:
        num_bytes += 2 * rows * columns
    return torch.get_num_threads() * num_bytes


def cpu_flash_backward_bytes(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any
) -> int:
    """Return two tiles of scores a thread, row sums, and a copy of a gradient that is not laid out
    (B, T, H, D) (``cpu_flash_attention_backward``)."""
    rows, columns = _cpu_tile(query, key)
    num_bytes = torch.get_num_threads() * rows * (8 * columns + 4)
    if query.element_size() == 2:
        num_bytes += torch.get_num_threads() * 4 * rows * columns
    return num_bytes + (0 if _is_tokens_first(grad) else grad.nbytes)


def _cpu_tile(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int]:
    num_tokens = query.shape[2]
    rows = 256 if num_tokens >= 768 else 64 if num_tokens >= 192 else 32
    return min(rows, num_tokens), min(512, key.shape[2])


def _is_tokens_first(tensor: torch.Tensor) -> bool:
    return tensor.transpose(1, 2).is_contiguous()


OPERATOR_WORKSPACES: Mapping[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_backward.default: flash_backward_bytes,
    aten._scaled_dot_product_flash_attention_for_cpu.default: cpu_flash_bytes,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: cpu_flash_backward_bytes,
}
"""Bytes that an operation takes and gives back, as a function of its arguments."""


@dataclass(frozen=True)
class AllocationCore:
    """Allocates what a kernel on a GPU would, and computes nothing."""

    kernel: Kernel
    layout: Layout | None
    documents: Documents

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memory for the output (B, H, T, D) and the lse (B, H, T)."""
        if self.kernel == "efficient":
            key, value = (expand_heads(tensor, query.shape[1]) for tensor in (key, value))
        return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
    ) -> Gradients:
        """Return memory for the gradients of query, key and value."""
        if self.kernel == "triton":
            return self._triton_backward(query, key)
        num_kv_heads = key.shape[1]
        if self.kernel == "efficient":
            key, value = (expand_heads(tensor, query.shape[1]) for tensor in (key, value))
        # Both run the forward pass again; its results live until the gradients are there.
        again = self.forward(query, key, value)
        row_sum = query.new_empty(query.shape[:3], dtype=torch.float32)
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        del again, row_sum
        return grads[0], sum_heads(grads[1], num_kv_heads), sum_heads(grads[2], num_kv_heads)

    def _triton_backward(self, query: torch.Tensor, key: torch.Tensor) -> Gradients:
        """``triton_op.block_sparse_attention_backward`` and ``triton_launch.run_grad_key_value``."""
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(key)
        assert self.layout is not None
        sizes = kernel_sizes(self.layout, self.documents, query.shape[3], query.dtype, key.shape[1])
        num_heads = query.shape[1] // sizes.num_heads_each
        by_head = None
        if num_heads != key.shape[1]:
            by_head = query.new_empty(2, *query.shape, dtype=torch.float32)
        padded = max(16, 1 << (query.shape[3] - 1).bit_length())
        partials = query.new_empty(2, num_heads, sizes.max_slots, sizes.keys, padded, dtype=torch.float32)
        del partials
        if by_head is not None:
            sum_heads(by_head[0], key.shape[1])
        return grads


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple
