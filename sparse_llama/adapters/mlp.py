"""The gated MLP with its product as one node, which keeps two tensors of the MLP's width and not three.

    down_proj(act(g) * u), g = gate_proj(x), u = up_proj(x)

Plain autograd keeps g, act(g) and u, 3F numbers per token; act(g) is cheap to make anew from g. The F numbers
saved pay for what o_proj and down_proj keep for their scales, 2C (``scale_bias.py``): F > 2C in every LLaMA.
Of an adapted g = scale * z the product keeps z, from which it makes g anew and the scale's gradient.

``C`` model width, ``F`` the MLP's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaMLP

from sparse_llama.adapters.linear_parts import linear_parts, sum_rows
from sparse_llama.adapters.scale_bias import ScaleBiasLinear

Activation = Callable[[torch.Tensor], torch.Tensor]


class AdaptedMLP(LlamaMLP):
    """A LlamaMLP over another one's own layers; names in a state dict do not change."""

    def __init__(self, base: LlamaMLP) -> None:
        nn.Module.__init__(self)  # the base class' own would allocate the weights again
        self.config = base.config
        self.hidden_size, self.intermediate_size = base.hidden_size, base.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = base.gate_proj, base.up_proj, base.down_proj
        self.act_fn = base.act_fn

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of other modules that this one's own nodes use, which ZeRO-3 has to gather
        around it."""
        parts = (linear_parts(layer) for layer in (self.gate_proj, self.up_proj) if _is_scaled(layer))
        return [one for part in parts for one in part[2:] if isinstance(one, nn.Parameter)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the (..., C) output; transformers' values and gradients to the bit."""
        if not torch.is_grad_enabled():
            return super().forward(x)  # which lets go of g before u is there
        factors: list[torch.Tensor | None] = []
        for layer in (self.gate_proj, self.up_proj):
            if _is_scaled(layer):
                factors += [layer(x, is_scaled=False), *linear_parts(layer)[2:]]
            else:
                factors += [layer(x), None, None]
        activation = self.act_fn.forward  # the function alone: DeepSpeed's hooks know no forward mode
        return self.down_proj(_GatedProduct.apply(*factors, activation))


def activation_gradient(
    activation: Activation, gate: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return act(gate) and grad * act'(gate), outside of autograd.

    An activation's Jacobian is diagonal, so that forward mode gives the gradient as well; an autograd.grad
    within a backward pass would break those who count on one pass at a time (multi-grad hooks).
    """
    with forward_ad.dual_level():
        dual = activation(forward_ad.make_dual(gate.detach(), grad))
        activated, gradient = forward_ad.unpack_dual(dual)
    assert gradient is not None
    return activated, gradient


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,  # (..., F), unscaled, as the next
        gate_scale: torch.Tensor | None,  # (F,)
        gate_shift: torch.Tensor | None,  # in gate already, here for its gradient
        up: torch.Tensor,
        up_scale: torch.Tensor | None,
        up_shift: torch.Tensor | None,
        activation: Activation,
    ) -> torch.Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, gate_scale, gate_shift, up, up_scale, up_shift)
        return activation(_scaled(gate, gate_scale)) * _scaled(up, up_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        gate, gate_scale, gate_shift, up, up_scale, up_shift = ctx.saved_tensors
        activated, grad_gate = activation_gradient(
            ctx.activation, _scaled(gate, gate_scale), grad * _scaled(up, up_scale)
        )
        grad_up = grad * activated
        del activated
        needs = ctx.needs_input_grad
        return (
            *_factor_gradients(grad_gate, gate, gate_scale, gate_shift, needs[1:3]),
            *_factor_gradients(grad_up, up, up_scale, up_shift, needs[4:6]),
            None,
        )


def _is_scaled(layer: nn.Module) -> bool:
    """Whether the layer has a scale, over a frozen base, as every adapter's is."""
    if not isinstance(layer, ScaleBiasLinear) or layer.adapter_scale is None:
        return False
    return linear_parts(layer).is_frozen


def _scaled(product: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return product if scale is None else product * scale.to(product.dtype)


def _factor_gradients(
    grad: torch.Tensor,
    product: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of z, scale and shift, of the gradient of scale * z."""
    grad_scale = grad_shift = None
    if scale is None:
        return grad, None, None
    flat = product.reshape(-1, product.shape[-1])
    if any(needs):
        grad_sum, product_sum = sum_rows(grad, flat.__getitem__ if needs[0] else None)
        grad_scale = product_sum.to(scale.dtype) if needs[0] else None
        if needs[1] and shift is not None:
            grad_shift = (grad_sum * scale.to(product.dtype)).to(shift.dtype)
    return grad * scale.to(grad.dtype), grad_scale, grad_shift
