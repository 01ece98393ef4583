"""The forward pass of a decoder layer over groups of heads, and the attention that its backward makes again.

Alive at the same time are x, the products of o_proj, which become the output, and q, k, v and o of a group:
2 + 4/c (B, T, C) tensors with c groups. A token's products with o_proj add up over groups, rounded once per
group.

``B`` batch, ``T`` tokens, ``C`` model width, ``H`` query heads, ``K`` key/value heads, ``D`` head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_llama.adapters.zero_init import prompt_output, prompt_probability
from sparse_llama.memory.head_groups_call import Group, LayerCall, PromptHeads
from sparse_llama.memory.head_groups_parts import rotate, rows_of


def forward_pass(hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Return the layer's output, (B, T, C)."""
    products, _ = attend(hidden, call, call.prompt_heads(), keeps_outputs=False)
    parts = call.parts
    for row, tokens in call.tiles(hidden):
        residual = parts.output.scaled(products[row, tokens]) + hidden[row, tokens]
        mapped = parts.mlp.output(parts.mlp_norm.output(residual))
        torch.add(residual, mapped, out=products[row, tokens])
    return products


@dataclass
class Attended:
    """A group's attention: the core's own output, (B, H, T, D), and its lse."""

    output: torch.Tensor
    lse: torch.Tensor


def attend(
    hidden: torch.Tensor, call: LayerCall, prompt: PromptHeads | None, *, keeps_outputs: bool
) -> tuple[torch.Tensor, dict[Group, Attended]]:
    """Return o_proj's products with its bias, before its scale, (B, T, C), and the attention of each group
    if it is kept."""
    products, kept = hidden.new_empty(hidden.shape), {}
    for group in call.groups:
        query, key, value = project(hidden, call, group)
        output, lse = call.core(group, query, key).forward(query, key, value)
        del key, value
        _add_products(products, output, query, prompt, call, group)
        if keeps_outputs:
            kept[group] = Attended(output, lse)
        del query, output, lse  # or they would be there while the next group's are made
    return products, kept


def _add_products(
    products: torch.Tensor,
    output: torch.Tensor,
    query: torch.Tensor,
    prompt: PromptHeads | None,
    call: LayerCall,
    group: Group,
) -> None:
    """Add what o_proj makes of a group's attention, (B, H, T, D), to ``products``; of the first, write it."""
    projection, rows = call.parts.output, call.parts.rows(group.heads)
    weight = projection.weight[:, rows]
    for row, tokens in call.tiles(products):
        total = output[row : row + 1, :, tokens]
        if prompt is not None:
            total = total + _prompt_part(query[row : row + 1, :, tokens], prompt, call, group)
        flat = total[0].transpose(0, 1).flatten(1)  # (T, H x D)
        if group is call.groups[0]:
            products[row, tokens] = F.linear(flat, weight, projection.total_bias())
        else:
            target = products[row, tokens]
            torch.addmm(target, flat, weight.t(), out=target)


def project(
    hidden: torch.Tensor, call: LayerCall, group: Group
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a group's rotated queries and keys and its values, (B, heads, T, D); in memory tokens come
    first, as the kernels know it from a projection of all heads."""
    parts = call.parts
    sources = ((parts.query, group.heads), (parts.key, group.kv_heads), (parts.value, group.kv_heads))
    made = [hidden.new_empty(*hidden.shape[:2], len(heads), parts.head_dim) for _, heads in sources]
    for row, tokens in call.tiles(hidden):
        normed = parts.attention_norm.output(hidden[row, tokens])
        for target, (projection, heads) in zip(made, sources, strict=True):
            made_of_tile = rows_of(projection, parts.rows(heads)).output(normed)
            one = made_of_tile.unflatten(-1, (-1, parts.head_dim))
            is_rotated = projection is not parts.value
            target[row, tokens] = rotate(one, *call.angles(row, tokens)) if is_rotated else one
    query, key, value = (one.transpose(1, 2) for one in made)
    return query, key, value


def _prompt_part(
    query: torch.Tensor,
    prompt: PromptHeads,
    call: LayerCall,
    group: Group,
) -> torch.Tensor:
    """Return a tile's gated prompt attention, (1, H, T, D)."""
    kv_heads = slice(group.kv_heads.start, group.kv_heads.stop)
    keys, values, gates = prompt[0][kv_heads], prompt[1][kv_heads], prompt[2]
    probability = prompt_probability(query, keys, call.parts.scaling)
    return prompt_output(probability, values, gates[group.heads.start : group.heads.stop], query.dtype)
