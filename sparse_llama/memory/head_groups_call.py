"""One call of a decoder layer over groups of heads: its groups, its parts, and the tiles it works in.

``B`` batch, ``T`` tokens, ``C`` model width, ``H`` query heads, ``K`` key/value heads, ``D`` head width,
``P`` prompt tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig

from sparse_llama.adapters.linear_parts import LinearParts, linear_parts
from sparse_llama.attention.core import AttentionCore, head_shares
from sparse_llama.attention.tile_loop import row_tiles
from sparse_llama.errors import ConfigError
from sparse_llama.memory.head_groups_parts import Norm, Prompt
from sparse_llama.memory.tiles import MLPParts

PromptHeads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A prompt's keys and values, each (K, P, D), and what multiplies each head's attention to them, (H,)."""

CoreOf = Callable[[torch.Tensor, torch.Tensor, range], AttentionCore]
"""Makes the core of a group from its queries, its keys and its query heads' numbers in the layer."""


@dataclass(frozen=True)
class Group:
    """Consecutive query heads, and the key/value heads that they share."""

    heads: range
    kv_heads: range


def make_groups(config: LlamaConfig, num_groups: int) -> tuple[Group, ...]:
    """Return equal groups of query heads: whole key/value heads with all that share them, or an equal part
    of what shares one.

    Parts of a key/value head's queries need no sum of its gradients: what they add to the layer's input and
    parameters is linear in them.

    Raises:
        ConfigError: there are no such groups.
    """
    num_heads = config.num_attention_heads
    num_kv_heads = config.num_key_value_heads or num_heads
    allowed = head_shares(num_heads, num_kv_heads)
    if num_groups not in allowed:
        raise ConfigError(
            f"sparse_llama.memory.head_groups: {num_groups} groups cannot share {num_heads} query heads over "
            f"{num_kv_heads} key/value heads evenly; use one of {', '.join(map(str, allowed))}"
        )
    size, sharing = num_heads // num_groups, num_heads // num_kv_heads
    starts = range(0, num_heads, size)
    return tuple(
        Group(range(start, start + size), range(start // sharing, (start + size - 1) // sharing + 1))
        for start in starts
    )


@dataclass(frozen=True)
class LayerParts:
    """A layer's parts and sizes."""

    attention_norm: Norm
    query: LinearParts
    key: LinearParts
    value: LinearParts
    output: LinearParts
    mlp_norm: Norm
    mlp: MLPParts
    prompt: Prompt | None
    num_heads: int
    head_dim: int
    scaling: float

    @classmethod
    def of(cls, layer: Any) -> "LayerParts":
        """Return those of a LlamaDecoderLayer, adapted or not."""
        attention, mlp = layer.self_attn, layer.mlp
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        attention_norm, mlp_norm = (Norm(norm.weight, norm.variance_epsilon) for norm in norms)
        return cls(
            attention_norm=attention_norm,
            query=linear_parts(attention.q_proj),
            key=linear_parts(attention.k_proj),
            value=linear_parts(attention.v_proj),
            output=linear_parts(attention.o_proj),
            mlp_norm=mlp_norm,
            mlp=MLPParts(
                *(linear_parts(one) for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
                activation=mlp.act_fn.forward,  # the function alone: DeepSpeed's hooks know no forward mode
            ),
            prompt=Prompt.of(getattr(attention, "zero_init", None)),
            num_heads=attention.config.num_attention_heads,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
        )

    def trained(self) -> tuple[torch.Tensor, ...]:
        """Return the parameters that train, of those whose gradients the backward pass knows."""
        linears = (self.query, self.key, self.value, self.output, *self.mlp[:3])
        found: list[torch.Tensor] = [self.attention_norm.weight, self.mlp_norm.weight]
        found += [one for linear in linears for one in (linear.scale, linear.shift) if one is not None]
        if self.prompt is not None:
            found += [self.prompt.prompt, self.prompt.gate]
        return tuple(parameter for parameter in found if parameter.requires_grad)

    def rows(self, heads: range) -> slice:
        """Return the rows of a projection that make some heads."""
        return slice(heads.start * self.head_dim, heads.stop * self.head_dim)


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: what its passes need beside the hidden states."""

    parts: LayerParts
    groups: tuple[Group, ...]
    tile: int
    """Tokens of a row that go through the token-wise parts at a time."""
    cos: torch.Tensor  # (1 or B, T, D)
    sin: torch.Tensor
    core_of: CoreOf
    cores: dict[Group, AttentionCore] = field(default_factory=dict)
    """Of the forward pass, which the backward pass asks again."""

    def core(self, group: Group, query: torch.Tensor, key: torch.Tensor) -> AttentionCore:
        """Return a group's core, for queries (B, H, T, D) and keys (B, K, T, D)."""
        if group not in self.cores:
            self.cores[group] = self.core_of(query, key, group.heads)
        return self.cores[group]

    def tiles(self, tensor: torch.Tensor) -> Iterator[tuple[int, slice]]:
        """Return the tiles of a (B, T, ...) tensor: a row of the batch, and tokens of it."""
        num_rows, num_tokens = tensor.shape[:2]
        for row in range(num_rows):
            for tokens in row_tiles(num_tokens, self.tile):
                yield row, tokens

    def angles(self, row: int, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of a tile, (T, D)."""
        row = row if self.cos.shape[0] > 1 else 0
        return self.cos[row, tokens], self.sin[row, tokens]

    def prompt_heads(self) -> PromptHeads | None:
        """Return the prompt's keys, values and gates; None without a prompt."""
        parts = self.parts
        if parts.prompt is None:
            return None
        keys, values = (parts.prompt.heads_of(one, parts.head_dim) for one in (parts.key, parts.value))
        return keys, values, parts.prompt.module.gates()
