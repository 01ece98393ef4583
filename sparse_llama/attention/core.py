"""What an attention core is: a forward and a backward pass, apart from autograd, over documents.

``B`` batch, ``T`` tokens, ``H`` query heads, ``K`` key/value heads, ``D`` head width.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch.autograd.function import once_differentiable

from sparse_llama.attention.tile_loop import row_tiles

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_TOKENS_AT_A_TIME = 2048


class AttentionCore(Protocol):
    """Attention of one layer over one batch, bound to its layout, its documents and its scale.

    Forward and backward are separate so that whoever wraps a core (the adapter) decides what is saved.
    """

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (B, H, T, D) output and the (B, H, T) log of the softmax' denominator."""
        ...

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
        """Return the gradients of query, key and value.

        Args:
            output, lse: of the forward pass.
            delta: (B, H, T) rowsum(grad * output), the caller's to supply; kernels that compute it from
                ``output`` themselves ignore it.
        """
        ...


class CoreAttention(torch.autograd.Function):
    """A core as one differentiable operation that saves its inputs, its output and the lse."""

    @staticmethod
    def forward(
        ctx: Any, core: AttentionCore, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        output, lse = core.forward(query, key, value)
        ctx.core = core
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, lse = ctx.saved_tensors
        delta = row_products(grad, output)
        return None, *ctx.core.backward(grad, query, key, value, output, lse, delta)


@runtime_checkable
class DifferentiableCore(AttentionCore, Protocol):
    """A core that is one operation with a gradient of its own, which may be traced and compiled."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the (B, H, T, D) output, differentiable."""
        ...


def attend(core: AttentionCore, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the (B, H, T, D) output of ``core``, differentiable."""
    if isinstance(core, DifferentiableCore):
        return core.attend(query, key, value)
    return CoreAttention.apply(core, query, key, value)  # type: ignore[no-any-return]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of softmax statistics: fp32, or fp64 under fp64 inputs (gradient checks)."""
    return torch.promote_types(dtype, torch.float32)


def token_slices(num_tokens: int) -> Iterator[slice]:
    """Return slices of tokens, for what would be several fp32 (B, H, T, D) at a time if it were whole."""
    return row_tiles(num_tokens, _TOKENS_AT_A_TIME)


def row_products(grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return rowsum(grad * output) of two (B, H, T, D), (B, H, T) in fp32 (fp64 of fp64)."""
    statistics = statistics_dtype(grad.dtype)
    sums = torch.empty(grad.shape[:-1], dtype=statistics, device=grad.device)
    for tokens in token_slices(grad.shape[2]):
        product = grad[:, :, tokens].to(statistics) * output[:, :, tokens].to(statistics)
        sums[:, :, tokens] = product.sum(-1)
    return sums


def head_shares(num_heads: int, num_kv_heads: int) -> list[int]:
    """Return into how many equal parts a layer's heads can be cut: whole key/value heads with all query heads
    that share them, or an equal part of what shares one."""
    return [
        number
        for number in range(1, num_heads + 1)
        if num_heads % number == 0 and (num_kv_heads % number == 0 or number % num_kv_heads == 0)
    ]


def heads_of_group(num_heads: int, num_kv_heads: int, num_groups: int) -> tuple[int, int]:
    """Return the query and the key/value heads of each of ``num_groups`` groups, one of ``head_shares``."""
    return num_heads // num_groups, max(1, num_kv_heads // num_groups)


def expand_heads(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return (B, K, S, D) as (B, H, S, D): every key/value head once per query head that shares it."""
    groups = num_heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def sum_heads(tensor: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Return (B, H, S, D) gradients as (B, K, S, D): the transpose of ``expand_heads``."""
    if tensor.shape[1] == num_kv_heads:
        return tensor
    return tensor.unflatten(1, (num_kv_heads, -1)).sum(2)
