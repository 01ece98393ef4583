"""Norms and MLPs a tile of tokens at a time: what is wider than a token, or of more bits, is one tile long.

In a layer's backward pass transformers' RMSNorm holds seven (T, C) in fp32 and its MLP seven (T, F): 14 and
19 times the layer's input at 7B in 16 bits. Here each is its result and up to ten tiles. DeepSpeed's
``TiledMLP`` (arXiv:2506.13996, section 3.2) runs an MLP under a checkpoint three times forward and calls
autograd once per tile; this one runs it twice, and autograd sees one node with one gradient per parameter.

``T`` tokens, ``C`` model width, ``F`` the MLP's.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from sparse_llama.adapters.linear_parts import (
    LinearParts,
    ScaleBiasSums,
    computing_dtype,
    linear_parts,
)
from sparse_llama.adapters.mlp import Activation, activation_gradient
from sparse_llama.adapters.norm import AdaptedRMSNorm, Normed, normalise, normed_from
from sparse_llama.adapters.scale_bias import ScaleBiasLinear
from sparse_llama.attention.tile_loop import row_tiles
from sparse_llama.config.settings import MemorySettings

_AFTER_NORM = ("q_proj", "k_proj", "v_proj")


def tile_layers(model: LlamaForCausalLM, settings: MemorySettings) -> None:
    """Make the norms and MLPs of ``model`` work on ``norm_tile`` and ``mlp_tile`` tokens at a time.

    Our modules, over the parameters of those they find, come in place of the norms and MLPs; names in a state
    dict do not change. With ``norm_tile`` an adapted q, k or v keeps nothing for the gradient of its scale,
    but is computed again from the norm's input: at a layer's peak each would be as large as the input itself.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if settings.norm_tile is not None and isinstance(child, LlamaRMSNorm):
                norm = child if isinstance(child, AdaptedRMSNorm) else AdaptedRMSNorm(child)
                norm.tile = settings.norm_tile
                setattr(parent, name, norm)
            elif isinstance(child, ScaleBiasLinear) and name in _AFTER_NORM:
                child.remakes = settings.norm_tile is not None
            elif settings.mlp_tile is not None and isinstance(child, LlamaMLP):
                setattr(parent, name, TiledMLP(child, settings.mlp_tile))


class MLPParts(NamedTuple):
    """The tensors of an MLP and what they are computed with."""

    gate: LinearParts
    up: LinearParts
    down: LinearParts
    activation: Activation

    def output(self, rows: torch.Tensor) -> torch.Tensor:
        """Return down(act(gate(x)) * up(x)), (rows, C), outside of autograd."""
        hidden = self.activation(self.gate.output(rows))
        return self.down.output(hidden.mul_(self.up.output(rows)))


class MLPSums:
    """The gradients of an MLP's scales and shifts, summed over tiles."""

    def __init__(self, parts: MLPParts, needs: tuple[bool, ...]) -> None:
        """``needs``: of gate's scale and shift, up's, and down's."""
        self.gate, self.up, self.down = (
            ScaleBiasSums(part, needs_scale=needs[2 * i], needs_shift=needs[2 * i + 1])
            for i, part in enumerate(parts[:3])
        )


def mlp_gradients(
    parts: MLPParts, rows: torch.Tensor, grad: torch.Tensor, sums: MLPSums, output: torch.Tensor | None
) -> None:
    """Write the gradient of an MLP's input to ``output`` and add those of its parameters to ``sums``.

    The factors are computed again from ``rows``: z itself, as every scale's gradient needs it, and y from z.

    Args:
        rows, grad, output: (rows, C) of one tile; ``output`` may be ``grad``, or None.
    """
    gate_product, up_product = parts.gate.unscaled(rows), parts.up.unscaled(rows)  # (rows, F)
    gate, up = parts.gate.scaled(gate_product), parts.up.scaled(up_product)
    grad_hidden = parts.down.input_gradient(grad)
    activated, grad_gate = activation_gradient(parts.activation, gate, grad_hidden * up)
    needs_product = sums.down.needs_scale
    sums.down.add(grad, parts.down.unscaled(activated * up) if needs_product else None)
    del gate, up
    grad_up = grad_hidden.mul_(activated)
    del activated
    sums.gate.add(grad_gate, gate_product)
    sums.up.add(grad_up, up_product)
    del gate_product, up_product
    if output is not None:
        parts.gate.input_gradient(grad_gate, output)
        del grad_gate
        output += parts.up.input_gradient(grad_up)


class TiledMLP(LlamaMLP):
    """A LlamaMLP, adapted or not, over another one's own layers; names in a state dict do not change.

    Its layers are not called: it uses their parameters, and hooks of theirs do not run.

    Args:
        tile: tokens, of all rows of a batch, that are computed at a time.
    """

    def __init__(self, base: LlamaMLP, tile: int) -> None:
        nn.Module.__init__(self)  # the base class' own would allocate the weights again
        self.config = base.config
        self.hidden_size, self.intermediate_size = base.hidden_size, base.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = base.gate_proj, base.up_proj, base.down_proj
        self.act_fn, self.tile = base.act_fn, tile

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of other modules that this one uses, which ZeRO-3 has to gather around it."""
        return [*self.gate_proj.parameters(), *self.up_proj.parameters(), *self.down_proj.parameters()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the (..., C) output; the untiled one's to the bit where a row of a matrix product does not
        depend on how many rows there are and the untiled one folds no scale into a weight."""
        parts = [linear_parts(layer) for layer in (self.gate_proj, self.up_proj, self.down_proj)]
        assert all(part.is_frozen for part in parts), "a tile computes no gradient of a weight"
        dtype = computing_dtype(x, parts[0].weight)
        work = _Work(MLPParts(parts[0], parts[1], parts[2], self.act_fn.forward), dtype, self.tile)
        if not torch.is_grad_enabled():
            return work.output(x)
        kept = _KeepInput.apply(x, normed_from(x), work, *parts[0], *parts[1], *parts[2])
        return _Compute.apply(kept, work)


class _Work(NamedTuple):
    parts: MLPParts
    dtype: torch.dtype
    tile: int

    def computing(self) -> MLPParts:
        """Return the parts in the type that is computed in."""
        gate, up, down, activation = self.parts
        return MLPParts(gate.to(self.dtype), up.to(self.dtype), down.to(self.dtype), activation)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        parts, width = self.computing(), x.shape[-1]
        output = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        rows_in, rows_out = x.reshape(-1, width), output.view(-1, width)
        for rows in row_tiles(rows_in.shape[0], self.tile):
            rows_out[rows] = parts.output(rows_in[rows].to(self.dtype))
        return output


class _KeepInput(torch.autograd.Function):
    """The MLP's backward pass. Forward it keeps what that needs, and leaves the computing to ``_Compute``.

    Under a non-reentrant checkpoint a layer is recomputed until the last tensor that its backward pass keeps.
    Kept before anything is computed, that is the MLP's input: the MLP does not run forward another time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, normed: Normed | None, work: _Work, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.dtype, ctx.tile, ctx.activation = work.dtype, work.tile, work.parts.activation
        ctx.epsilon = None if normed is None else normed.epsilon
        # where x comes from a norm, that keeps its own input, from which x is made anew
        kept = (x, None) if normed is None else (normed.hidden, normed.weight)
        ctx.save_for_backward(*kept, *tensors)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        source, norm_weight, *tensors = ctx.saved_tensors
        needs_x, _, _, *needs = ctx.needs_input_grad
        gate, up, down = (LinearParts(*tensors[i : i + 4]) for i in (0, 4, 8))
        parts = _Work(MLPParts(gate, up, down, ctx.activation), ctx.dtype, ctx.tile).computing()
        sums = MLPSums(parts, tuple(needs[i] for i in (2, 3, 6, 7, 10, 11)))
        width = source.shape[-1]
        grad_x = torch.empty(source.shape, dtype=ctx.dtype, device=source.device) if needs_x else None
        rows_in, rows_of_grad = source.reshape(-1, width), grad.reshape(-1, width)
        for rows in row_tiles(rows_in.shape[0], ctx.tile):
            part = rows_in[rows]
            if ctx.epsilon is not None:
                part = normalise(Normed(part, norm_weight, ctx.epsilon))
            mlp_gradients(
                parts,
                part.to(ctx.dtype),
                rows_of_grad[rows].to(ctx.dtype),
                sums,
                None if grad_x is None else grad_x.view(-1, width)[rows],
            )
        gradients: list[torch.Tensor | None] = []
        for one in (sums.gate, sums.up, sums.down):
            gradients += [None, None, *one.gradients()]
        return grad_x, None, None, *gradients


class _Compute(torch.autograd.Function):
    """The MLP's forward pass. What comes back is the output's gradient, and goes on to ``_KeepInput``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, work: _Work) -> torch.Tensor:
        return work.output(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return grad, None
