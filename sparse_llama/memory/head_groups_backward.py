"""The backward pass of a decoder layer over groups of heads, in three passes.

With c groups, alive at the same time are, in (B, T, C) tensors,

    attention again   x, the gradient, the products of o_proj, all o; q, k, v of a group        4 + 3/c
    MLP               x, the gradient, the products, all o; the MLP of a tile of tokens         4 + the tile
    attention         x, the gradient, do, all o; q, k, v, dq, dk, dv of a group; the core's    4 + 8/c

where the core's own is 2/c for an fp32 accumulator of dq in 16 bits, and 0 for kernels without one. The
second pass writes the gradient of the residual stream over the incoming one and do over the products, the
third adds to the former. All of the MLP is made again, and nothing twice but q, k and v.

``B`` batch, ``T`` tokens, ``C`` model width, ``H`` query heads, ``K`` key/value heads, ``D`` head width,
``P`` prompt tokens, ``F`` the MLP's width.
"""

from dataclasses import dataclass

import torch

from sparse_llama.adapters.zero_init import prompt_gradients, prompt_probability
from sparse_llama.attention.core import statistics_dtype
from sparse_llama.memory.head_groups_call import Group, LayerCall, PromptHeads
from sparse_llama.memory.head_groups_forward import Attended, project
from sparse_llama.memory.head_groups_parts import GradientSums, rotate_backward, rows_of
from sparse_llama.memory.tiles import MLPSums, mlp_gradients


def mlp_backward(
    hidden: torch.Tensor, grad: torch.Tensor, products: torch.Tensor, call: LayerCall, sums: GradientSums
) -> torch.Tensor:
    """The second pass. Return do, the gradient of all heads' outputs, (B, T, H, D).

    Args:
        grad: of the output; becomes that of the residual stream after attention.
        products: of o_proj; do is in their memory where heads are as wide as the model.
    """
    parts, output = call.parts, call.parts.output
    width = parts.num_heads * parts.head_dim
    is_as_wide = products.shape[-1] == width
    grad_heads = products if is_as_wide else products.new_empty(*products.shape[:2], width)
    linears = parts.mlp[:3]
    needs = [sums.wants(one) for linear in linears for one in (linear.scale, linear.shift)]
    mlp_sums = MLPSums(parts.mlp, tuple(needs))
    for row, tokens in call.tiles(hidden):
        product, grad_tile = products[row, tokens], grad[row, tokens]
        residual = output.scaled(product) + hidden[row, tokens]
        grad_normed = torch.empty_like(residual)
        mlp_gradients(parts.mlp, parts.mlp_norm.output(residual), grad_tile, mlp_sums, grad_normed)
        grad_tile += parts.mlp_norm.backward(grad_normed, residual, sums)
        del grad_normed, residual
        sums.add_linear(output, grad_tile, product)
        grad_heads[row, tokens] = output.input_gradient(grad_tile)
    for linear, summed in zip(linears, (mlp_sums.gate, mlp_sums.up, mlp_sums.down), strict=True):
        for parameter, found in zip((linear.scale, linear.shift), summed.gradients(), strict=True):
            if found is not None:
                sums.add(parameter, found)
    return grad_heads.unflatten(-1, (-1, parts.head_dim))


def attention_backward(
    hidden: torch.Tensor,
    grad: torch.Tensor,
    grad_heads: torch.Tensor,
    attended: dict[Group, Attended],
    call: LayerCall,
    prompt: PromptHeads | None,
    sums: GradientSums,
    *,
    needs_hidden: bool,
) -> None:
    """The third pass: a group's attention, prompt and projections backward, group after group.

    Args:
        grad: of the residual stream after attention; becomes that of ``hidden``.
        grad_heads: (B, T, H, D).
        attended: of every group; an output is let go once its group is done.
        needs_hidden: whether anyone asks for the gradient of ``hidden``.
    """
    parts = call.parts
    projections = (parts.query, parts.key, parts.value)
    adapted = [one for projection in projections for one in (projection.scale, projection.shift)]
    needs_attention = needs_hidden or sums.wants(parts.attention_norm.weight, *adapted)
    if not needs_attention and prompt is None:
        return
    prompt_sums = None if prompt is None else PromptSums.like(prompt)
    for group in call.groups:
        grad_output = grad_heads[:, :, group.heads.start : group.heads.stop].transpose(1, 2)
        query, key, value = project(hidden, call, group)
        grads: tuple[torch.Tensor, ...] | None = None
        if needs_attention:
            own = attended.pop(group)
            delta = _row_sums(grad_output, own.output, call)
            core = call.core(group, query, key)
            grads = core.backward(grad_output, query, key, value, own.output, own.lse, delta)
            del own, delta
        del key, value
        if prompt is not None and prompt_sums is not None:
            grad_query = None if grads is None else grads[0]
            _prompt_backward(grad_output, query, grad_query, prompt, prompt_sums, call, group)
            del grad_query
        del query, grad_output
        if grads is not None:
            _projections_backward(hidden, grad, grads, call, group, sums)
        del grads
    if parts.prompt is not None and prompt_sums is not None:
        parts.prompt.projection_backward(parts.key, prompt_sums.key, sums)
        parts.prompt.projection_backward(parts.value, prompt_sums.value, sums)
        parts.prompt.gate_backward(prompt_sums.gate, sums)


def _projections_backward(
    hidden: torch.Tensor,
    grad: torch.Tensor,
    grads: tuple[torch.Tensor, ...],
    call: LayerCall,
    group: Group,
    sums: GradientSums,
) -> None:
    """Add to ``grad`` what reaches the layer's input through a group's queries, keys and values."""
    parts = call.parts
    projections = (parts.query, parts.key, parts.value)
    owned = (parts.rows(group.heads), parts.rows(group.kv_heads), parts.rows(group.kv_heads))
    for row, tokens in call.tiles(hidden):
        tile = hidden[row, tokens]
        scales = [projection.scale for projection in projections]
        normed = parts.attention_norm.output(tile) if sums.wants(*scales) else tile
        grad_normed = torch.zeros_like(tile)
        for projection, rows, grad_made in zip(projections, owned, grads, strict=True):
            one = grad_made[row, :, tokens].transpose(0, 1)  # (T, heads, D)
            if projection is not parts.value:
                one = rotate_backward(one, *call.angles(row, tokens))
            flat, of_group = one.flatten(1), rows_of(projection, rows)
            product = of_group.unscaled(normed) if sums.wants(projection.scale) else None
            sums.add_linear(projection, flat, product, rows)
            torch.addmm(grad_normed, of_group.scaled(flat), of_group.weight, out=grad_normed)
        grad[row, tokens] += parts.attention_norm.backward(grad_normed, tile, sums)


@dataclass(frozen=True)
class PromptSums:
    """The gradients of a prompt's keys and values, (K, P, D), and of the gates, (H,), over all tiles."""

    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor

    @classmethod
    def like(cls, prompt: PromptHeads) -> "PromptSums":
        key, value, gate = (torch.zeros_like(one, dtype=statistics_dtype(one.dtype)) for one in prompt)
        return cls(key, value, gate)


def _prompt_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    grad_query: torch.Tensor | None,
    prompt: PromptHeads,
    sums: PromptSums,
    call: LayerCall,
    group: Group,
) -> None:
    """Add a group's prompt attention's gradients to those of its queries and to ``sums``.

    Args:
        grad, query, grad_query: (B, H, T, D); the last is None where nobody asks for it.
    """
    heads = slice(group.heads.start, group.heads.stop)
    kv_heads = slice(group.kv_heads.start, group.kv_heads.stop)
    keys, values, gates = prompt[0][kv_heads], prompt[1][kv_heads], prompt[2][heads]
    scaling = call.parts.scaling
    for row, tokens in call.tiles(grad.transpose(1, 2)):
        tile, grad_tile = query[row : row + 1, :, tokens], grad[row : row + 1, :, tokens]
        probability = prompt_probability(tile, keys, scaling)
        grads = prompt_gradients(
            grad_tile, tile, keys, values, gates, probability=probability, scaling=scaling
        )
        sums.key[kv_heads] += grads.key
        sums.value[kv_heads] += grads.value
        sums.gate[heads] += grads.gate
        if grad_query is not None:
            grad_query[row : row + 1, :, tokens] += grads.query


def _row_sums(grad: torch.Tensor, output: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Return rowsum(grad * output) of (B, H, T, D) tensors, (B, H, T), in fp32."""
    sums = grad.new_empty(grad.shape[:-1], dtype=statistics_dtype(grad.dtype))
    for row, tokens in call.tiles(grad.transpose(1, 2)):
        sums[row, :, tokens] = (grad[row, :, tokens].to(sums.dtype) * output[row, :, tokens]).sum(-1)
    return sums
