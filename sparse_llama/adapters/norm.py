"""RMSNorm with a trained weight that keeps what a frozen one keeps: its input, the residual stream.

    y = weight * x / sqrt(mean(x^2) + epsilon)

transformers' own, once its weight trains, keeps the normalised tensor as well, and in 16 bits an fp32 copy of
the input: 4C and 8C bytes per token. Here both are made anew in the backward pass. So is y itself: nobody has
to keep the input of a linear layer after a norm who can have it from ``normed_from``.

Eager fp32 is dear: the backward pass of transformers' own in 16 bits holds seven (T, C) in fp32, which is the
peak of a layer at long context. With a ``tile`` every fp32 tensor is that many tokens long.

``T`` tokens, ``C`` model width.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparse_llama.attention.core import statistics_dtype
from sparse_llama.attention.tile_loop import row_tiles

_NOTE = "_normed_from"


class Normed(NamedTuple):
    """How a tensor came to be: what ``normalise`` was given."""

    hidden: torch.Tensor  # (..., C)
    weight: torch.Tensor  # (C,)
    epsilon: float


class AdaptedRMSNorm(LlamaRMSNorm):
    """A LlamaRMSNorm over another one's own weight, which the base and a ZeRO-3 partition still know.

    Args:
        tile: tokens that are normalised at a time; None is all of them.
    """

    def __init__(self, base: LlamaRMSNorm, *, tile: int | None = None) -> None:
        nn.Module.__init__(self)  # the base class' own would allocate a second weight
        self.weight, self.variance_epsilon, self.tile = base.weight, base.variance_epsilon, tile

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normalised (..., C) in the input's dtype; transformers' values to the bit."""
        normed = Normed(hidden_states, self.weight, self.variance_epsilon)
        if not torch.is_grad_enabled():
            return normalise(normed, self.tile)
        output = _Normalise.apply(*normed, self.tile)
        setattr(output, _NOTE, (normed, output._version))
        return output


def normalise(normed: Normed, tile: int | None = None) -> torch.Tensor:
    """Return the norm's output, statistics in fp32 (fp64 of an fp64 model, where transformers' own rounds to
    fp32); an fp32 weight over a 16-bit model is rounded first.

    Every row is on its own, so that tiles change no bit where the sum over a row does not depend on how many
    there are, as on a CPU.
    """
    hidden, weight, epsilon = normed
    dtype, width = hidden.dtype, hidden.shape[-1]
    if tile is None or hidden.numel() <= tile * width:
        return weight.to(dtype) * _normalised(hidden, epsilon)[0].to(dtype)
    output = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    rows_in, rows_out = hidden.reshape(-1, width), output.view(-1, width)
    for rows in row_tiles(rows_in.shape[0], tile):
        normalised, _ = _normalised(rows_in[rows], epsilon)
        torch.mul(weight.to(dtype), normalised.to(dtype), out=rows_out[rows])
    return output


def norm_gradients(
    normed: Normed, grad: torch.Tensor, output: torch.Tensor | None, weight_sum: torch.Tensor | None
) -> None:
    """Write the input's gradient to ``output`` and add the weight's to ``weight_sum``, of some rows.

    Args:
        grad, output: (rows, C); one tensor may be both, or ``output`` None.
        weight_sum: (C,), fp64, of sums in fp32; None where the weight does not train.
    """
    hidden, weight, epsilon = normed
    grad_float = grad.to(statistics_dtype(hidden.dtype))
    normalised, inverse = _normalised(hidden, epsilon)
    if weight_sum is not None:
        weight_sum += (grad_float * normalised).sum(0)
    if output is not None:
        scaled = grad_float * weight.to(grad_float.dtype)
        along = (scaled * normalised).mean(-1, keepdim=True)  # the part that the norm takes out again
        output.copy_(scaled.addcmul_(normalised, along, value=-1).mul_(inverse))


def normed_from(tensor: torch.Tensor) -> Normed | None:
    """Return how a norm made this very tensor, None where that is not known.

    A part, a copy or a tensor changed in place does not know. Under ZeRO-3 every module gets copies, as it
    should be: the norm's weight is whole around the norm only, where no other module could use it.
    """
    base = tensor._base  # of a view; transformers gives the head its input as x[:, 0:], all of it
    if base is not None and base.shape == tensor.shape and base.stride() == tensor.stride():
        tensor = base
    normed, version = getattr(tensor, _NOTE, (None, None))
    return normed if normed is not None and version == tensor._version else None


def forget_norm(output: torch.Tensor) -> None:
    """Let ``normed_from`` know nothing of a norm's output, as of a copy."""
    if hasattr(output, _NOTE):
        delattr(output, _NOTE)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, tile: int | None
    ) -> torch.Tensor:
        ctx.epsilon, ctx.tile = epsilon, tile
        ctx.save_for_backward(hidden, weight)
        return normalise(Normed(hidden, weight, epsilon), tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight, _, _ = ctx.needs_input_grad
        width = hidden.shape[-1]
        grad_hidden = None
        if needs_hidden:  # contiguous, whatever the input is
            grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        weight_sum = weight.new_zeros(width, dtype=torch.float64) if needs_weight else None
        rows_in, rows_of_grad = hidden.reshape(-1, width), grad.reshape(-1, width)
        for rows in row_tiles(rows_in.shape[0], ctx.tile):
            norm_gradients(
                Normed(rows_in[rows], weight, ctx.epsilon),
                rows_of_grad[rows],
                None if grad_hidden is None else grad_hidden.view(-1, width)[rows],
                weight_sum,
            )
        grad_weight = None if weight_sum is None else weight_sum.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _normalised(hidden: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x / rms and 1 / rms, (..., C) and (..., 1), in the statistics' type."""
    hidden = hidden.to(statistics_dtype(hidden.dtype))
    inverse = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)
    return hidden * inverse, inverse
