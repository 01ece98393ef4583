"""RMSNorm with a trained weight that keeps what a frozen one keeps: its input, the residual stream.

    y = weight * x / sqrt(mean(x^2) + epsilon)

transformers' own, once its weight trains, keeps the normalised tensor as well, and in 16 bits an fp32 copy of
the input: 4C and 8C bytes per token. Here both are made anew in the backward pass. So is y itself: nobody has
to keep the input of a linear layer after a norm who can have it from ``normed_from``.

``C`` model width.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm

_NOTE = "_normed_from"


class Normed(NamedTuple):
    """How a tensor came to be: what ``normalise`` was given."""

    hidden: torch.Tensor  # (..., C)
    weight: torch.Tensor  # (C,)
    epsilon: float


class AdaptedRMSNorm(LlamaRMSNorm):
    """A LlamaRMSNorm over another one's own weight, which the base and a ZeRO-3 partition still know."""

    def __init__(self, base: LlamaRMSNorm) -> None:
        nn.Module.__init__(self)  # the base class' own would allocate a second weight
        self.weight, self.variance_epsilon = base.weight, base.variance_epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normalised (..., C) in the input's dtype; transformers' values to the bit."""
        normed = Normed(hidden_states, self.weight, self.variance_epsilon)
        if not torch.is_grad_enabled():
            return normalise(normed)
        output = _Normalise.apply(*normed)
        setattr(output, _NOTE, (normed, output._version))
        return output


def normalise(normed: Normed) -> torch.Tensor:
    """Return the norm's output, statistics in fp32; an fp32 weight over a 16-bit model is rounded first."""
    dtype = normed.hidden.dtype
    hidden = normed.hidden.to(torch.float32)
    variance = hidden.pow(2).mean(-1, keepdim=True)
    hidden = hidden * torch.rsqrt(variance + normed.epsilon)
    return normed.weight.to(dtype) * hidden.to(dtype)


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


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        ctx.epsilon = epsilon
        ctx.save_for_backward(hidden, weight)
        return normalise(Normed(hidden, weight, epsilon))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = grad_weight = None
        normalised, grad_float = hidden.to(torch.float32), grad.to(torch.float32)
        inverse = torch.rsqrt(normalised.pow(2).mean(-1, keepdim=True) + ctx.epsilon)  # (..., 1)
        normalised = normalised * inverse
        if needs_weight:
            grad_weight = (grad_float * normalised).flatten(0, -2).sum(0).to(weight.dtype)
        if needs_hidden:
            scaled = grad_float * weight.to(torch.float32)
            along = (scaled * normalised).mean(-1, keepdim=True)  # the part that the norm takes out again
            grad_hidden = scaled.addcmul_(normalised, along, value=-1).mul_(inverse).to(hidden.dtype)
        return grad_hidden, grad_weight, None
