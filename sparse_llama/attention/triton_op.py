"""The Triton kernels as differentiable PyTorch operations, opaque to compile, checkpointing and fake tensors.

``sparse_llama::block_sparse_attention`` returns (o, lse), ``..._backward`` (dq, dk, dv). Tables and numbers
are plain arguments (``tiles.Launch``): what depends on nothing else may be recomputed, saved, traced or
replayed.

``B`` batch, ``T`` tokens, ``H`` query heads, ``K`` key/value heads, ``D`` head width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from sparse_llama.attention.core import Gradients, row_products, sum_heads
from sparse_llama.attention.documents import Documents
from sparse_llama.attention.tiles import KeySizes, RowSizes, TiledLayout
from sparse_llama.errors import ConfigError

try:
    from sparse_llama.attention.triton_launch import run_forward, run_grad_key_value, run_grad_query
except ImportError as error:
    raise ConfigError(
        "sparse_llama.attention.backend: triton is not installed; pip install triton, or use auto"
    ) from error

Tensors = Sequence[torch.Tensor]
Numbers = Sequence[int]


@dataclass(frozen=True)
class TritonCore:
    """Block-sparse attention of packed documents on CUDA (or in Triton's interpreter)."""

    tiled: TiledLayout
    documents: Documents
    scaling: float

    def __post_init__(self) -> None:
        if self.scaling <= 0:
            raise ConfigError(
                f"scale: the Triton kernels take a positive one, got {self.scaling}; negate q instead"
            )

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.tiled.launches(self.documents, query, key.shape[1]).forward
        empty: list[torch.Tensor] = []
        return block_sparse_attention(
            query, key, value, self.scaling, self.documents.is_whole, *rows, empty, [], empty, []
        )

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
        launches = self.tiled.launches(self.documents, query, key.shape[1])
        return block_sparse_attention_backward(
            grad,
            query,
            key,
            value,
            lse,
            delta,
            self.scaling,
            self.documents.is_whole,
            *launches.grad_query,
            *launches.grad_key,
        )

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the output as one differentiable operation, for graphs that no Python may interrupt."""
        launches = self.tiled.launches(self.documents, query, key.shape[1])
        output, _ = block_sparse_attention(
            query,
            key,
            value,
            self.scaling,
            self.documents.is_whole,
            *launches.forward,
            *launches.grad_query,
            *launches.grad_key,
        )
        return output


@torch.library.custom_op("sparse_llama::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    is_whole: bool,
    rows: Tensors,
    row_sizes: Numbers,
    grad_rows: Tensors,
    grad_row_sizes: Numbers,
    grad_keys: Tensors,
    grad_key_sizes: Numbers,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (B, H, T, D) output and the (B, H, T) log of the softmax' denominator.

    Args:
        is_whole: whether every token is in a document; the others get 0.
        rows, row_sizes: the launch of the forward pass.
        grad_rows, grad_row_sizes, grad_keys, grad_key_sizes: those of the backward pass, empty if none
        follows.
    """
    output, lse = _new_output(query, is_whole)
    query, key, value = (_rows_in_one_piece(tensor) for tensor in (query, key, value))
    with _on_device_of(query):
        run_forward(query, key, value, output, lse, scaling, rows, RowSizes(*row_sizes))
    return output, lse


@torch.library.custom_op("sparse_llama::block_sparse_attention_backward", mutates_args=())
def block_sparse_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scaling: float,
    is_whole: bool,
    rows: Tensors,
    row_sizes: Numbers,
    keys: Tensors,
    key_sizes: Numbers,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value; ``delta`` is (B, H, T), rowsum(grad * output)."""
    grad_query, grad_key, grad_value = _new_gradients(query, key, is_whole)
    grad, query, key, value = (_rows_in_one_piece(tensor) for tensor in (grad, query, key, value))
    saved = (query, key, value, grad, lse.contiguous(), delta.contiguous())
    sizes = KeySizes(*key_sizes)
    with _on_device_of(query):
        run_grad_query(saved, grad_query, scaling, rows, RowSizes(*row_sizes))
        if query.shape[1] // key.shape[1] == sizes.num_heads_each:
            run_grad_key_value(saved, grad_key, grad_value, scaling, keys, sizes)
            return grad_query, grad_key, grad_value
        # The query heads of a key/value head have different patterns: a gradient for each, then their sum.
        new = torch.empty if is_whole else torch.zeros
        by_head = new((2, *query.shape), dtype=torch.float32, device=query.device)
        run_grad_key_value(saved, by_head[0], by_head[1], scaling, keys, sizes)
        grad_key.copy_(sum_heads(by_head[0], key.shape[1]))
        grad_value.copy_(sum_heads(by_head[1], key.shape[1]))
    return grad_query, grad_key, grad_value


@block_sparse_attention.register_fake
def _(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _new_output(query, is_whole=True)


@block_sparse_attention_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _new_gradients(query, key, is_whole=True)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, scaling, is_whole, rows, _, grad_rows, grad_row_sizes, grad_keys, grad_key_sizes = (
        inputs
    )
    attended, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, attended, lse, *grad_rows, *grad_keys)
    ctx.options = (scaling, is_whole, grad_row_sizes, grad_key_sizes)
    ctx.lengths = (len(rows), len(grad_rows), len(grad_keys))


def _differentiate(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[Any, ...]:
    query, key, value, output, lse, *tables = ctx.saved_tensors
    scaling, is_whole, row_sizes, key_sizes = ctx.options
    num_forward, num_rows, num_keys = ctx.lengths
    delta = row_products(grad, output)
    grads = block_sparse_attention_backward(
        grad,
        query,
        key,
        value,
        lse,
        delta,
        scaling,
        is_whole,
        tables[:num_rows],
        row_sizes,
        tables[num_rows:],
        key_sizes,
    )
    return (*grads, None, None, [None] * num_forward, None, [None] * num_rows, None, [None] * num_keys, None)


block_sparse_attention.register_autograd(_differentiate, setup_context=_save)


def _rows_in_one_piece(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device, which need not be the tensors'
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _new_output(query: torch.Tensor, is_whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    new = torch.empty if is_whole else torch.zeros
    return _new_like(query, is_whole), new(query.shape[:3], dtype=torch.float32, device=query.device)


def _new_gradients(
    query: torch.Tensor, key: torch.Tensor, is_whole: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # dk and dv alike, whatever the strides of v: the kernel has one set for both
    return _new_like(query, is_whole), _new_like(key, is_whole), _new_like(key, is_whole)


def _new_like(tensor: torch.Tensor, is_whole: bool) -> torch.Tensor:
    """Return memory for a result, with the strides of ``tensor``: a transposed one stays cheap to undo."""
    tensor = _rows_in_one_piece(tensor)
    return torch.empty_like(tensor) if is_whole else torch.zeros_like(tensor)
