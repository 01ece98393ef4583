"""Attention of the newest tokens to a cached prefix, reading the keys that their rows of the layout see.

A token's row is the same whatever follows it, so a step of decoding computes the training forward's row: of
524,288 cached tokens it reads the few thousand that the layout names.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_llama.attention.core import Gradients, expand_heads, statistics_dtype
from sparse_llama.attention.prepared import prepare
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import Layout


@dataclass(frozen=True)
class DecodingCore:
    """The last T of S tokens, one document a row; a core without a backward pass."""

    layout: Layout | None
    """None, or causal at S tokens: full attention."""
    scaling: float

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, last = query.shape[2], key.shape[2]
        # No one asks for the lse of a decoding step: it is for a backward pass.
        lse = query.new_zeros(query.shape[:-1], dtype=statistics_dtype(query.dtype))
        if self.layout is None or prepare(self.layout).is_causal_at(last):
            return self._full(query, key, value), lse
        output = torch.empty_like(query)
        block, first = self.layout.block, last - num_tokens
        for row in range(first // block, (last - 1) // block + 1):
            low, high = max(first, row * block), min(last, (row + 1) * block)
            queries = slice(low - first, high - first)
            output[:, :, queries] = self._row(query[:, :, queries], key, value, row, low)
        return output, lse

    def _full(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        num_heads, num_tokens, last = query.shape[1], query.shape[2], key.shape[2]
        positions = torch.arange(last, device=query.device)
        mask = None if num_tokens == 1 else positions[last - num_tokens :, None] >= positions  # (T, S)
        key, value = expand_heads(key, num_heads), expand_heads(value, num_heads)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)

    def _row(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: int, first: int
    ) -> torch.Tensor:
        """Return the attention of tokens ``first`` and on, all of block row ``row``."""
        layout = self.layout
        assert layout is not None
        last = first + query.shape[2]
        tokens, is_real = prepare(layout).keys_of_row(row, query.device)
        end = tokens.shape[1] - ((row + 1) * layout.block - last)  # keys that are not cached yet
        tokens = tokens[:, :end]
        mask = None if is_real is None else is_real[:, None, :end]  # (patterns, 1, S)
        if query.shape[2] > 1:
            is_past = tokens[:, None] <= torch.arange(first, last, device=tokens.device)[:, None]
            mask = is_past if mask is None else mask & is_past  # (patterns, T, S)
        if len(layout.patterns) == 1:
            keys, values = (expand_heads(t[:, :, tokens[0]], query.shape[1]) for t in (key, value))
        else:
            own = torch.tensor(layout.head_patterns, device=tokens.device)
            shared = torch.arange(query.shape[1], device=tokens.device) // (query.shape[1] // key.shape[1])
            keys, values = (t[:, shared[:, None], tokens[own]] for t in (key, value))  # (B, H, S, D)
            mask = None if mask is None else mask[own]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scaling)

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
    ) -> Gradients:
        raise ConfigError("use_cache: a cached prefix has no gradient; train with use_cache=False")
