"""The arithmetic of a linear layer with a scale and a bias per output, apart from modules and autograd.

    z = W x + bias + shift,  y = scale * z
    dx = (dy * scale) W,  dscale = sum(dy * z),  dshift = scale * sum(dy)

Whoever computes over tiles of rows has z at hand in each, and adds up the sums in ``ScaleBiasSums``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from sparse_llama.attention.core import statistics_dtype
from sparse_llama.attention.tile_loop import row_tiles

# Numbers whose fp32 copies and products are made and summed at a time, not T x F: few enough for a CPU's
# cache (2,048 x 11,008 in 13 ms in place of 44), enough for a GPU to be busy.
_SLICE, _SLICE_ON_GPU = 1 << 20, 1 << 23


class LinearParts(NamedTuple):
    """The tensors of a linear layer, adapted or not."""

    weight: torch.Tensor  # (out, in)
    bias: torch.Tensor | None  # (out,), the base's
    scale: torch.Tensor | None  # (out,), the adapter's; None computes as 1 would
    shift: torch.Tensor | None  # (out,), the adapter's bias

    def to(self, dtype: torch.dtype) -> "LinearParts":
        """Return the same layer with its weight, by which everything is computed, in ``dtype``."""
        return self._replace(weight=self.weight.to(dtype))

    def total_bias(self) -> torch.Tensor | None:
        """Return the sum of the base's bias and the adapter's in the weight's dtype, rounded once."""
        if self.bias is not None and self.shift is not None:
            return (self.bias + self.shift).to(self.weight.dtype)
        total = self.bias if self.shift is None else self.shift
        return None if total is None else total.to(self.weight.dtype)

    def unscaled(self, rows: torch.Tensor) -> torch.Tensor:
        """Return z, (..., out), of ``rows``, (..., in)."""
        return F.linear(rows, self.weight, self.total_bias())

    def scaled(self, product: torch.Tensor) -> torch.Tensor:
        """Return y of z; z itself where there is no scale."""
        return product if self.scale is None else product * self.scale.to(self.weight.dtype)

    def output(self, rows: torch.Tensor) -> torch.Tensor:
        """Return y where nobody needs z; outside of autograd."""
        product = self.unscaled(rows)
        return product if self.scale is None else product.mul_(self.scale.to(self.weight.dtype))

    def input_gradient(self, grad: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """Return dx, (rows, in), of ``grad``, (rows, out); in ``output`` where that is given."""
        scaled = grad if self.scale is None else grad * self.scale.to(self.weight.dtype)
        return torch.mm(scaled, self.weight, out=output)

    @property
    def trains(self) -> tuple[bool, bool]:
        """Whether the scale trains, and whether the shift does."""
        return _requires_grad(self.scale), _requires_grad(self.shift)

    @property
    def is_frozen(self) -> bool:
        """Whether the base's own tensors are."""
        return not (_requires_grad(self.weight) or _requires_grad(self.bias))


class ScaleBiasSums:
    """The gradients of one layer's scale and shift, summed over tiles of rows in fp32 (fp64 for fp64).

    The tiles' sums are added up in fp64, which for so few numbers costs nothing: a thousand of them in fp32
    are 1e-6 off.
    """

    def __init__(self, parts: LinearParts, *, needs_scale: bool, needs_shift: bool) -> None:
        self._parts, self.needs_scale, self.needs_shift = parts, needs_scale, needs_shift
        size = int(needs_scale or needs_shift), parts.weight.shape[0]
        self._grad_sum, self._product_sum = (
            parts.weight.new_zeros(size, dtype=torch.float64) for _ in range(2)
        )

    def add(self, grad: torch.Tensor, product: torch.Tensor | None) -> None:
        """Take in one tile.

        Args:
            grad: (rows, out), of y.
            product: (rows, out), z; None where the scale does not train.
        """
        if not (self.needs_scale or self.needs_shift):
            return
        factors = None if product is None or not self.needs_scale else product.__getitem__
        grad_sum, product_sum = sum_rows(grad, factors)
        self._grad_sum += grad_sum
        self._product_sum += product_sum

    def gradients(
        self, factor: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of scale and shift in their own dtypes, times the 0-dim ``factor``."""
        scale, shift = self._parts.scale, self._parts.shift
        grad_scale = grad_shift = None
        if self.needs_scale and scale is not None:
            total = self._product_sum[0] if factor is None else self._product_sum[0] * factor
            grad_scale = total.to(scale.dtype)
        if self.needs_shift and shift is not None:
            total = self._grad_sum[0] if factor is None else self._grad_sum[0] * factor
            # rounded as it multiplied the product
            applied = total if scale is None else total * scale.to(self._parts.weight.dtype)
            grad_shift = applied.to(shift.dtype)
        return grad_scale, grad_shift


def linear_parts(layer: nn.Linear) -> LinearParts:
    """Return the tensors of a Linear or a ScaleBiasLinear."""
    adapted: Any = layer
    scale, shift = (getattr(adapted, name, None) for name in ("adapter_scale", "adapter_bias"))
    return LinearParts(layer.weight, layer.bias, scale, shift)


def computing_dtype(input: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Return the type that a layer computes in: its weight's, under autocast that one's.

    A backward pass of our own runs outside of autocast, so whoever has one casts by hand.
    """
    device = input.device.type
    # a planner's "meta" device knows none
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def sum_rows(
    grad: torch.Tensor, factors: Callable[[slice], torch.Tensor] | None, least_rows: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums over all rows of grad and of grad * factors, each (out,), fp64.

    A slice's products and sum are fp32 (fp64 of fp64).

    Args:
        factors: gives the rows of a slice; None leaves its sum at 0.
        least_rows: that are summed at a time, however wide they are.
    """
    grad = grad.reshape(-1, grad.shape[-1])
    num_rows, width = grad.shape
    grad_sum, product_sum = grad.new_zeros(2, width, dtype=torch.float64)
    step = max((_SLICE if grad.device.type == "cpu" else _SLICE_ON_GPU) // width, least_rows)
    for rows in row_tiles(num_rows, step):
        part = grad[rows].to(statistics_dtype(grad.dtype))
        grad_sum += part.sum(0)
        if factors is not None:
            product_sum += (part * factors(rows)).sum(0)
    return grad_sum, product_sum


def _requires_grad(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
