"""Head and cross entropy over labelled tokens, a tile at a time, forward and backward at once.

Logits are V numbers per token, in fp32 and their softmax again: at V = 32,000, 47 times the hidden state. A
tile's logits give its loss, and at once the gradients of its hidden rows and of the head's scale and bias;
what is kept is one gradient of the rows' own size, and for an adapted head 2V numbers.

DeepSpeed's ``TiledFusedLogitsLoss`` (arXiv:2506.13996, section 3.1) does the same, but gives the head's
parameters their gradients before it knows by what the loss is multiplied: wrong under gradient accumulation
and loss scaling. Here both are multiplied in the backward pass.

``C`` model width, ``V`` vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from sparse_llama.adapters.linear_parts import (
    LinearParts,
    ScaleBiasSums,
    computing_dtype,
    linear_parts,
)
from sparse_llama.attention.core import statistics_dtype
from sparse_llama.attention.tile_loop import row_tiles

# fp16 has no number below 6e-8, and a softmax over 32,000 many: they are multiplied by a power of two, which
# costs no bit, until they have met the weight. 2,048 * |weight| stays far below the largest, 65,504.
_HEADROOM = {torch.float16: 2.0**11}


class TiledHeadLoss(nn.Module):
    """The cross entropy of a head's logits, of which ``tile`` rows exist at a time.

    A module, so that ZeRO-3 gathers the head's parameters around it, over a head that it does not own: names
    in a state dict do not change.
    """

    def __init__(self, head: nn.Linear, tile: int) -> None:
        super().__init__()
        self.tile = tile
        vars(self)["head"] = head  # not setattr, which would register it a second time

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Return the head's parameters."""
        return list(vars(self)["head"].parameters())

    def forward(self, hidden: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the 0-dim sum of the cross entropy, fp32 (fp64 of an fp64 head); 0 for no rows.

        Args:
            hidden: (tokens, C).
            rows: (labelled,) int64, which of them count.
            labels: (labelled,) int64, what each of those predicts.
        """
        parts = linear_parts(vars(self)["head"])
        assert parts.is_frozen, "a tile computes no gradient of the head's weight"
        dtype = computing_dtype(hidden, parts.weight)
        if dtype != parts.weight.dtype:
            parts = parts.to(dtype)
        if torch.is_grad_enabled():
            return _TiledLoss.apply(hidden, rows, labels, self.tile, *parts)
        return _over_tiles(parts, hidden, rows, labels, self.tile)


class _TiledLoss(torch.autograd.Function):
    """The loss as one node. It keeps gradients up to a factor: no logits, no hidden rows and no weight."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (tokens, C)
        rows: torch.Tensor,  # (labelled,)
        labels: torch.Tensor,  # (labelled,)
        tile: int,
        weight: torch.Tensor,  # (V, C)
        bias: torch.Tensor | None,  # (V,), the base's
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
    ) -> torch.Tensor:
        needs_hidden, *_, needs_scale, needs_shift = ctx.needs_input_grad
        parts = LinearParts(weight, bias, scale, shift)
        grad_rows = None
        if needs_hidden:
            grad_rows = weight.new_empty(rows.shape[0], hidden.shape[1])
        sums = ScaleBiasSums(parts, needs_scale=needs_scale, needs_shift=needs_shift)
        total = _over_tiles(parts, hidden, rows, labels, tile, grad_rows, sums)
        ctx.tile, ctx.sums, ctx.headroom = tile, sums, _HEADROOM.get(weight.dtype, 1.0)
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        ctx.save_for_backward(rows, grad_rows)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        rows, grad_rows = ctx.saved_tensors
        grad_hidden = None
        if grad_rows is not None:
            grad_hidden = factor.new_zeros(ctx.hidden_shape, dtype=ctx.hidden_dtype)
            for one in row_tiles(rows.shape[0], ctx.tile):
                # in fp32: a factor such as 1 / 12 rounded to 16 bits would bend every gradient the same way
                part = grad_rows[one].to(factor.dtype) * (factor / ctx.headroom)
                grad_hidden.index_copy_(0, rows[one], part.to(ctx.hidden_dtype))
        return grad_hidden, None, None, None, None, None, *ctx.sums.gradients(factor)


def _over_tiles(
    parts: LinearParts,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    labels: torch.Tensor,
    tile: int,
    grad_rows: torch.Tensor | None = None,
    sums: ScaleBiasSums | None = None,
) -> torch.Tensor:
    """Return the 0-dim sum of the cross entropy; fill ``grad_rows``, (labelled, C), and ``sums``."""
    dtype = parts.weight.dtype
    needs_gradient = grad_rows is not None or (sums is not None and (sums.needs_scale or sums.needs_shift))
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for one in row_tiles(rows.shape[0], tile):
        product = parts.unscaled(hidden[rows[one]].to(dtype))  # (tile, V)
        logits = parts.scaled(product).to(statistics_dtype(dtype))
        total += _cross_entropy_(logits, labels[one], needs_gradient)
        if sums is not None:
            sums.add(logits, product)
        del product
        if grad_rows is not None:
            grad = logits.mul_(_HEADROOM.get(dtype, 1.0)).to(dtype)
            del logits
            parts.input_gradient(grad, grad_rows[one])
    return total.to(statistics_dtype(dtype))


def _cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, needs_gradient: bool) -> torch.Tensor:
    """Return the sum of the cross entropy of (rows, V) logits, and leave its gradient in their place."""
    index = labels[:, None]
    largest = logits.amax(-1, keepdim=True)
    picked = logits.gather(-1, index) - largest
    denominator = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    if needs_gradient:
        logits.div_(denominator).scatter_add_(-1, index, torch.full_like(picked, -1.0))
    return (denominator.log() - picked).sum()
