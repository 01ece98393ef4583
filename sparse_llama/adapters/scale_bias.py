"""A linear layer with a trained scale and bias per output: LLaMA-Adapter v2 (arXiv:2304.15010, section 3.1).

    y = scale * (W x + bias_base + bias)

The scale is on the output, as in lit-llama (``lit_llama/adapter_v2.py``, 2a464de, lines 30-47).

Plain autograd would keep z = W x + bias_base + bias of every layer for the scale's gradient, sum(grad * z),
beside what others keep: 5C + 2F numbers per token and decoder layer, 85 KB at 7B in bf16. Here:

    gate, up        mlp.py's product keeps z in place of y, and makes y anew
    o, down         z: nobody keeps y. mlp.py keeps one tensor less, which pays for both
    q, k            attention keeps them rotated. In 16 bits z: norm.py keeps 2C bytes per norm where
                    transformers' keeps 4C, which pays for both. In fp32 the input, as the head
    v               attention keeps y, and sum(grad * y) / scale is as near as a sum over z to fp64's within
                    the rounding of y (measured for scales from 1 to 1e-8). In fp16, whose y vanishes below
                    6e-8, the input, as the head
    the head        the input: the loss keeps no logits. z is computed again, 2 in * out operations per token,
                    and so is the input where it comes from a norm

Where every tensor counts (``remakes``) q and k do as the head, and so does v.

Scaling costs a pass over the product, folding the scale into W one over the weight: where nobody needs z,
whichever is smaller is done, and a folded weight lives as long as its product takes.

``C`` model width, ``F`` the MLP's width.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sparse_llama.adapters.linear_parts import LinearParts, computing_dtype, linear_parts, sum_rows
from sparse_llama.adapters.norm import Normed, normalise, normed_from

Becomes = Literal["kept", "rotated", "added", "product", "logits"]
Keeps = Literal["product", "output", "input"]

_LEAST_ROWS = 512  # of a product made again, or it would spend its time reading the weight


class ScaleBiasLinear(nn.Linear):
    """A Linear over another one's own parameters, with ``adapter_scale`` and ``adapter_bias`` on top.

    Either may be None, which computes as 1 or 0 would. The weight is the same Parameter object: a tied
    embedding stays tied, a ZeRO-3 partition stays one, and the base's names in a state dict do not change.

    Args:
        becomes: what the output becomes: attention keeps it as it is ("kept") or rotated, it is added to the
            residual stream, is a factor of the MLP's product, or is logits.
    """

    adapter_scale: nn.Parameter | None
    adapter_bias: nn.Parameter | None

    def __init__(self, base: nn.Linear, *, becomes: Becomes = "kept") -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate and initialise a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.becomes: Becomes = becomes
        self.remakes = False
        """Compute z again for the scale's gradient, 2 in * out operations per token, rather than keep it."""
        self.register_parameter("adapter_scale", None)
        self.register_parameter("adapter_bias", None)

    def new_parameters(self, scale: bool, bias: bool) -> dict[str, nn.Parameter]:
        """Return what is asked for of the two parameters, at values that change nothing."""
        like = {"dtype": self.weight.dtype, "device": self.weight.device}
        parameters: dict[str, nn.Parameter] = {}
        if scale:
            parameters["adapter_scale"] = nn.Parameter(torch.ones(self.out_features, **like))
        if bias:
            parameters["adapter_bias"] = nn.Parameter(torch.zeros(self.out_features, **like))
        return parameters

    def forward(self, input: torch.Tensor, *, is_scaled: bool = True) -> torch.Tensor:
        """Return the scaled and shifted projection; equal to the base's to the bit at scale 1 and bias 0.

        Args:
            is_scaled: False leaves out the scale and gives neither scale nor bias a gradient; the caller does
                (``mlp.py``).
        """
        parts, normed = linear_parts(self), normed_from(input)
        dtype = computing_dtype(input, parts.weight)
        if dtype != parts.weight.dtype:
            input, parts = input.to(dtype), parts.to(dtype)
        if not is_scaled:
            total = parts.total_bias()
            return F.linear(input, parts.weight, None if total is None else total.detach())
        if parts.scale is None:
            return parts.unscaled(input)
        if not (torch.is_grad_enabled() and _any_trains(input, *parts)):
            return _scaled_linear(input, parts)
        if not parts.is_frozen:  # no adapter's business, but its gradients must not get lost
            return parts.scaled(parts.unscaled(input))
        return _ScaledLinear.apply(input, *parts, self._keeps(parts.weight.dtype), normed)

    def _keeps(self, dtype: torch.dtype) -> Keeps:
        if self.becomes == "logits" or (self.remakes and self.becomes in ("kept", "rotated")):
            return "input"
        if self.becomes == "kept":
            return "input" if dtype == torch.float16 else "output"
        return "input" if self.becomes == "rotated" and dtype.itemsize >= 4 else "product"


class _ScaledLinear(torch.autograd.Function):
    """The layer as one node. It saves parameters as they are: ZeRO-3 gathers them again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,  # (..., in)
        weight: torch.Tensor,  # (out, in)
        bias: torch.Tensor | None,  # (out,), the base's
        scale: torch.Tensor,  # (out,)
        shift: torch.Tensor | None,  # (out,), the adapter's
        keeps: Keeps,
        normed: Normed | None,
    ) -> torch.Tensor:
        needs_scale = ctx.needs_input_grad[3]
        ctx.keeps = keeps if needs_scale else None
        parts = LinearParts(weight, bias, scale, shift)
        kept: tuple[torch.Tensor, ...] = ()
        if ctx.keeps == "product":
            product = parts.unscaled(input)
            output, kept = parts.scaled(product), (product,)
        else:
            if ctx.keeps == "output":
                parts = parts._replace(scale=_divisor(scale, weight.dtype))
            output = _scaled_linear(input, parts)
            if ctx.keeps == "output":
                kept = (output,)
            elif ctx.keeps == "input":
                kept = (input,) if normed is None else (normed.hidden, normed.weight)
        ctx.epsilon = None if normed is None else normed.epsilon
        ctx.save_for_backward(weight, bias, scale, shift, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        weight, bias, scale, shift, *kept = ctx.saved_tensors
        needs_input, _, _, needs_scale, needs_shift, _, _ = ctx.needs_input_grad
        parts = LinearParts(weight, bias, scale, shift)
        factor = _divisor(scale, weight.dtype) if ctx.keeps == "output" else scale.to(weight.dtype)
        grad_input = grad_scale = grad_shift = None
        if needs_input:
            grad_input = _scaled_product(grad, weight, factor)
        if needs_scale or needs_shift:

            def factors(rows: slice) -> torch.Tensor:
                part = kept[0].reshape(-1, kept[0].shape[-1])[rows]
                if ctx.keeps != "input":
                    return part  # of z, or of y
                if ctx.epsilon is not None:
                    part = normalise(Normed(part, kept[1], ctx.epsilon))
                return parts.unscaled(part.to(weight.dtype))

            least_rows = _LEAST_ROWS if ctx.keeps == "input" else 1
            grad_sum, product_sum = sum_rows(grad, factors if needs_scale else None, least_rows)
            if needs_shift:
                grad_shift = (grad_sum * factor).to(shift.dtype)
            if needs_scale:
                grad_scale = (product_sum / factor if ctx.keeps == "output" else product_sum).to(scale.dtype)
        return grad_input, None, None, grad_scale, grad_shift, None, None


def _any_trains(*tensors: torch.Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _divisor(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the scale in the layer's dtype, away from 0, so that y / scale still knows z.

    What stands for 0 is 1e-19 in fp32 and bf16: y is as good as 0, and as exact as ever.
    """
    factor, smallest = scale.to(dtype), torch.finfo(dtype).tiny ** 0.5
    return factor.masked_fill(factor.abs() < smallest, smallest)


def _folds(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether scaling the weight is less work than scaling what it makes of ``rows``, or ``rows`` of grad."""
    return rows.numel() // rows.shape[-1] > weight.shape[1]


def _scaled_linear(input: torch.Tensor, parts: LinearParts) -> torch.Tensor:
    """Return scale * (W x + bias), outside of autograd."""
    if parts.scale is None or not _folds(input, parts.weight):
        return parts.output(input)
    scale, total = parts.scale.to(parts.weight.dtype), parts.total_bias()
    return F.linear(input, parts.weight * scale[:, None], None if total is None else total * scale)


def _scaled_product(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return (grad * scale) W, the input's gradient."""
    return grad @ (weight * scale[:, None]) if _folds(grad, weight) else (grad * scale) @ weight
