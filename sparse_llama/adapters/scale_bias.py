"""A linear layer with a trained scale and bias per output: LLaMA-Adapter v2 (arXiv:2304.15010, section 3.1).

    y = scale * (W x + bias_base + bias)

The scale is on the output, as in lit-llama (``lit_llama/adapter_v2.py``, 2a464de, lines 30-47).

Plain autograd would keep z = W x + bias_base + bias of every layer for the scale's gradient, sum(grad * z):
5C + 2F numbers per token and decoder layer, 85 KB at 7B in bf16. Here that gradient comes from what somebody
keeps anyway:

    v, gate, up     the output, sum(grad * y) / scale: attention keeps v, the MLP's product its two factors
    o, down         the output too; mlp.py keeps one tensor less, which pays for both
    q, k            attention keeps them rotated. In 16 bits the output: norm.py keeps 2C bytes per norm where
                    transformers' keeps 4C, which pays for both. In fp32 the input, as the head
    the head        the input: the loss keeps no logits. z is computed again, 2 in * out operations per token,
                    and so is the input where it comes from a norm

Scaling costs a pass over the product, folding the scale into W one over the weight: whichever is smaller is
done, and a folded weight lives as long as its product takes.

``C`` model width, ``F`` the MLP's width.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sparse_llama.adapters.norm import Normed, normalise, normed_from
from sparse_llama.attention.core import statistics_dtype

Becomes = Literal["kept", "rotated", "logits"]

# Numbers whose fp32 copies and products are made and summed at a time, not T x F: few enough for a CPU's
# cache (2,048 x 11,008 in 13 ms in place of 44), enough for a GPU to be busy.
_SLICE, _SLICE_ON_GPU = 1 << 20, 1 << 23
_SLICE_ROWS = 512  # but no fewer rows, or a product over them would spend its time reading the weight


class ScaleBiasLinear(nn.Linear):
    """A Linear over another one's own parameters, with ``adapter_scale`` and ``adapter_bias`` on top.

    Either may be None, which computes as 1 or 0 would. The weight is the same Parameter object: a tied
    embedding stays tied, a ZeRO-3 partition stays one, and the base's names in a state dict do not change.

    Args:
        becomes: what the output becomes that others keep: it stays as it is, is rotated, or is logits.
    """

    adapter_scale: nn.Parameter | None
    adapter_bias: nn.Parameter | None

    def __init__(self, base: nn.Linear, *, becomes: Becomes = "kept") -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate and initialise a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.becomes: Becomes = becomes
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

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the scaled and shifted projection; equal to the base's to the bit at scale 1 and bias 0."""
        scale, shift = self.adapter_scale, self.adapter_bias
        weight, bias, normed = self.weight, self.bias, normed_from(input)
        if torch.is_autocast_enabled(input.device.type):  # a backward pass of our own runs outside of it
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight = input.to(dtype), weight.to(dtype)
        total = _total_bias(bias, shift, weight.dtype)
        if scale is None:
            return F.linear(input, weight, total)
        if not (torch.is_grad_enabled() and _any_trains(input, weight, bias, scale, shift)):
            return _scaled_linear(input, weight, total, scale.to(weight.dtype))
        if _any_trains(weight, bias):  # no adapter's business, but their gradients must not get lost
            return F.linear(input, weight, total) * scale.to(weight.dtype)
        keeps_output = self.becomes == "kept" or (self.becomes == "rotated" and weight.dtype.itemsize < 4)
        return _ScaledLinear.apply(input, weight, bias, scale, shift, keeps_output, normed)


class _ScaledLinear(torch.autograd.Function):
    """The layer as one node. It saves parameters as they are (ZeRO-3 gathers them again) and no x or z."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,  # (..., in)
        weight: torch.Tensor,  # (out, in)
        bias: torch.Tensor | None,  # (out,), the base's
        scale: torch.Tensor,  # (out,)
        shift: torch.Tensor | None,  # (out,), the adapter's
        keeps_output: bool,
        normed: Normed | None,
    ) -> torch.Tensor:
        ctx.divides = ctx.needs_input_grad[3] and keeps_output
        factor = _factor(scale, weight.dtype, is_divisor=ctx.divides)
        output = _scaled_linear(input, weight, _total_bias(bias, shift, weight.dtype), factor)
        kept: tuple[torch.Tensor, ...] = ()
        if ctx.divides:
            kept = (output,)
        elif ctx.needs_input_grad[3]:
            kept = (input,) if normed is None else (normed.hidden, normed.weight)
        ctx.epsilon = None if normed is None else normed.epsilon
        ctx.save_for_backward(weight, bias, scale, shift, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        weight, bias, scale, shift, *kept = ctx.saved_tensors
        needs_input, _, _, needs_scale, needs_shift, _, _ = ctx.needs_input_grad
        factor = _factor(scale, weight.dtype, is_divisor=ctx.divides)
        grad_input = grad_scale = grad_shift = None
        if needs_input:
            grad_input = _scaled_product(grad, weight, factor)
        if needs_scale or needs_shift:
            total = _total_bias(bias, shift, weight.dtype)

            def factors(rows: slice) -> torch.Tensor:
                part = kept[0].reshape(-1, kept[0].shape[-1])[rows]
                if ctx.divides:
                    return part  # of y
                if ctx.epsilon is not None:
                    part = normalise(Normed(part, kept[1], ctx.epsilon))
                return F.linear(part.to(weight.dtype), weight, total)  # z

            least_rows = 1 if ctx.divides else _SLICE_ROWS
            grad_sum, product_sum = _sum_rows(grad, factors if needs_scale else None, least_rows)
            if needs_shift:
                grad_shift = (grad_sum * factor).to(shift.dtype)
            if needs_scale:
                grad_scale = (product_sum / factor if ctx.divides else product_sum).to(scale.dtype)
        return grad_input, None, None, grad_scale, grad_shift, None, None


def _any_trains(*tensors: torch.Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _total_bias(
    bias: torch.Tensor | None, shift: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return the sum of the base's bias and the adapter's, rounded once."""
    if bias is not None and shift is not None:
        return (bias + shift).to(dtype)
    total = bias if shift is None else shift
    return None if total is None else total.to(dtype)


def _factor(scale: torch.Tensor, dtype: torch.dtype, *, is_divisor: bool) -> torch.Tensor:
    """Return the scale in the layer's dtype; as a divisor away from 0, so that y / scale still knows z.

    What stands for 0 is 1e-19 in fp32 and bf16: y is as good as 0, and as exact as ever. fp16 has no such
    number; its 6e-5 leaves y below the rounding of 1 and y / scale within 5e-4.
    """
    factor = scale.to(dtype)
    if not is_divisor:
        return factor
    limits = torch.finfo(dtype)
    smallest = min(limits.tiny**0.5, limits.eps / 16)
    return factor.masked_fill(factor.abs() < smallest, smallest)


def _folds(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether scaling the weight is less work than scaling what it makes of ``rows``, or ``rows`` of grad."""
    return rows.numel() // rows.shape[-1] > weight.shape[1]


def _scaled_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor
) -> torch.Tensor:
    """Return scale * (W x + bias), outside of autograd."""
    if _folds(input, weight):
        return F.linear(input, weight * scale[:, None], None if bias is None else bias * scale)
    return F.linear(input, weight, bias).mul_(scale)


def _scaled_product(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return (grad * scale) W, the input's gradient."""
    return grad @ (weight * scale[:, None]) if _folds(grad, weight) else (grad * scale) @ weight


def _sum_rows(
    grad: torch.Tensor, factors: Callable[[slice], torch.Tensor] | None, least_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums over all rows of grad and of grad * factors, each (out,), in fp32.

    Args:
        least_rows: that are summed at a time, however wide they are.
    """
    grad = grad.reshape(-1, grad.shape[-1])
    num_rows, width = grad.shape
    step = max((_SLICE_ON_GPU if grad.is_cuda else _SLICE) // width, least_rows)
    grad_sum, product_sum = grad.new_zeros(2, width, dtype=statistics_dtype(grad.dtype))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        part = grad[rows].to(grad_sum.dtype)
        grad_sum += part.sum(0)
        if factors is not None:
            product_sum += (part * factors(rows)).sum(0)
    return grad_sum, product_sum
