"""The gated MLP with its product as one node, which keeps two tensors of the MLP's width and not three.

    down_proj(act(g) * u), g = gate_proj(x), u = up_proj(x)

Plain autograd keeps g, act(g) and u, 3F numbers per token; act(g) is cheap to make anew from g. The F numbers
saved pay for the outputs of o_proj and down_proj, 2C, that ``scale_bias.py`` keeps: F > 2C in every LLaMA.

``C`` model width, ``F`` the MLP's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaMLP


class AdaptedMLP(LlamaMLP):
    """A LlamaMLP over another one's own layers; names in a state dict do not change."""

    def __init__(self, base: LlamaMLP) -> None:
        nn.Module.__init__(self)  # the base class' own would allocate the weights again
        self.config = base.config
        self.hidden_size, self.intermediate_size = base.hidden_size, base.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = base.gate_proj, base.up_proj, base.down_proj
        self.act_fn = base.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the (..., C) output; transformers' values and gradients to the bit."""
        if not torch.is_grad_enabled():
            return super().forward(x)  # which lets go of g before u is there
        activation = self.act_fn.forward  # the function alone: DeepSpeed's hooks know no forward mode
        return self.down_proj(_GatedProduct.apply(self.gate_proj(x), self.up_proj(x), activation))


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        # An activation's Jacobian is diagonal, so that forward mode gives act'(g) * (grad * u) as well; an
        # autograd.grad in here would break those who count on one backward pass at a time (multi-grad hooks).
        with forward_ad.dual_level():
            dual = ctx.activation(forward_ad.make_dual(gate.detach(), grad * up))
            activated, grad_gate = forward_ad.unpack_dual(dual)
        return grad_gate, grad * activated, None
