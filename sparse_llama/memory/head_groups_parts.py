"""The token-wise parts of a decoder layer, forward and backward, on the rows of a tile.

Outside of autograd and of the modules' own forwards. Gradients of parameters are summed over tiles and groups
of heads in fp32, and come out once. Where a scale trains, z = W x + b is at hand or made again in the tile:
y / scale would not know z where the scale is 0.

``T`` tokens of a tile, ``C`` model width, ``H`` query heads, ``K`` key/value heads, ``D`` head width, ``P``
prompt tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sparse_llama.adapters.linear_parts import LinearParts, sum_rows
from sparse_llama.adapters.zero_init import ZeroInitAttention
from sparse_llama.attention.core import statistics_dtype

_ALL = slice(None)


class GradientSums:
    """The gradients of the parameters that train, in fp32 (fp64 under fp64) until all is added."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._sums = {
            id(parameter): torch.zeros_like(parameter, dtype=statistics_dtype(parameter.dtype))
            for parameter in parameters
        }

    def wants(self, *parameters: torch.Tensor | None) -> bool:
        """Return whether any of these trains."""
        return any(id(parameter) in self._sums for parameter in parameters)

    def add(self, parameter: torch.Tensor | None, grad: torch.Tensor, rows: slice = _ALL) -> None:
        """Add ``grad`` to the ``rows`` of a parameter's gradient, if it trains."""
        if id(parameter) in self._sums:
            self._sums[id(parameter)][rows] += grad

    def add_linear(
        self, parts: LinearParts, grad: torch.Tensor, product: torch.Tensor | None, rows: slice = _ALL
    ) -> None:
        """Add the gradients of scale and shift.

        Args:
            grad: (T, out), of y, of the outputs ``rows``.
            product: (T, out), z; needed where the scale trains.
        """
        if not self.wants(parts.scale, parts.shift):
            return
        grad_sum, product_sum = sum_rows(grad, None if product is None else product.__getitem__)
        self.add(parts.scale, product_sum, rows)
        if parts.scale is not None:
            grad_sum = grad_sum * parts.scale[rows].to(grad.dtype)  # as the forward pass rounds it
        self.add(parts.shift, grad_sum, rows)

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a parameter's gradient in its own type."""
        return self._sums[id(parameter)].to(parameter.dtype)


def rows_of(parts: LinearParts, rows: slice) -> LinearParts:
    """Return the linear layer of some of the outputs, which is views."""
    weight, *vectors = parts
    return LinearParts(weight[rows], *(None if one is None else one[rows] for one in vectors))


@dataclass(frozen=True)
class Norm:
    """transformers' RMSNorm; statistics in fp32, or in fp64 where the model is, whose own rounds to fp32."""

    weight: torch.Tensor  # (C,)
    epsilon: float

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the normalised (T, C)."""
        normalised, _ = self._normalise(hidden)
        return self.weight.to(hidden.dtype) * normalised.to(hidden.dtype)

    def backward(self, grad: torch.Tensor, hidden: torch.Tensor, sums: GradientSums) -> torch.Tensor:
        """Return the gradient of ``hidden``, (T, C) in the statistics' type, and add the weight's."""
        normalised, inverse = self._normalise(hidden)
        scaled = grad.to(normalised.dtype)
        if sums.wants(self.weight):
            sums.add(self.weight, (scaled * normalised).sum(0))
        scaled = scaled * self.weight.to(normalised.dtype)
        along = (scaled * normalised).mean(-1, keepdim=True)  # the part that the norm takes out again
        return scaled.addcmul_(normalised, along, value=-1).mul_(inverse)

    def _normalise(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = hidden.to(statistics_dtype(hidden.dtype))
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)  # (T, 1)
        return wide * inverse, inverse


@dataclass(frozen=True)
class Prompt:
    """A layer's adaption prompt and gates."""

    module: ZeroInitAttention
    prompt: torch.Tensor  # (P, C)
    gate: torch.Tensor  # (H,) or (1,)

    @classmethod
    def of(cls, module: ZeroInitAttention | None) -> "Prompt | None":
        """Return a layer's; None where it has none."""
        if module is None or module.prompt is None:
            return None
        assert module.gate is not None
        return cls(module, module.prompt, module.gate)

    def heads_of(self, projection: LinearParts, head_dim: int) -> torch.Tensor:
        """Return the prompt's keys or values, (K, P, D)."""
        rows = projection.output(self.prompt.to(projection.weight.dtype))
        return rows.unflatten(-1, (-1, head_dim)).transpose(0, 1)

    def projection_backward(self, projection: LinearParts, grad: torch.Tensor, sums: GradientSums) -> None:
        """Add the gradients that ``grad``, (K, P, D) of the keys or values, has for the prompt and the
        projection."""
        dtype = projection.weight.dtype
        rows = grad.transpose(0, 1).flatten(1).to(dtype)
        product = projection.unscaled(self.prompt.to(dtype)) if sums.wants(projection.scale) else None
        sums.add_linear(projection, rows, product)
        sums.add(self.prompt, projection.input_gradient(rows))

    def gate_backward(self, grad: torch.Tensor, sums: GradientSums) -> None:
        """Add the gates' gradient, given that of what multiplies each head, (H,)."""
        if self.gate.numel() == 1:
            grad = grad.sum(0, keepdim=True)
        if self.module.gate_activation == "tanh":
            grad = grad * (1 - self.gate.to(grad.dtype).tanh().square())
        sums.add(self.gate, grad)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return (T, H, D) heads turned by their positions' angles, (T, D)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def rotate_backward(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return the gradient of ``rotate``'s input."""
    first, second = (grad * sin[:, None]).chunk(2, dim=-1)
    return grad * cos[:, None] + torch.cat((second, -first), dim=-1)
