"""An adapted LLaMA written out from the formulas in plain tensors: what the gradient check measures by.

Nothing of this project's is called: every token attends by an explicit table, the prompt by its own softmax,
the loss is over all logits, and autograd differentiates it. Quadratic in the tokens. Statistics are in fp32,
and in fp64 where the weights are.

``B`` batch, ``T`` tokens, ``H`` query heads, ``K`` key/value heads, ``D`` head width, ``C`` model width,
``P`` prompt tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

Weights = Mapping[str, Tensor]
"""By name in the adapted model's state dict."""


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents."""

    input_ids: Tensor  # (B, T)
    position_ids: Tensor  # (B, T), 0 where a document starts
    labels: Tensor  # (B, T), what each token predicts; -100 is nothing
    sees: Tensor  # (B, H, T, T) bool


def summed_loss(weights: Weights, config: LlamaConfig, batch: Batch) -> Tensor:
    """Return the 0-dim sum of the cross entropy over the labelled tokens."""
    hidden = weights["model.embed_tokens.weight"][batch.input_ids]
    rotation = _rotation(config, batch.position_ids, hidden)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        normed = _norm(weights, f"{layer}.input_layernorm", hidden, config)
        hidden = hidden + _attention(weights, f"{layer}.self_attn", normed, rotation, batch.sees, config)
        normed = _norm(weights, f"{layer}.post_attention_layernorm", hidden, config)
        gate, up = (_linear(weights, f"{layer}.mlp.{name}_proj", normed) for name in ("gate", "up"))
        hidden = hidden + _linear(weights, f"{layer}.mlp.down_proj", F.silu(gate) * up)
    logits = _linear(weights, "lm_head", _norm(weights, "model.norm", hidden, config))  # (B, T, V)
    wide = logits.to(_wide(logits)).flatten(0, 1)
    return F.cross_entropy(wide, batch.labels.flatten(), reduction="sum")


def attend(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scaling: float) -> Tensor:
    """Return softmax(scaling q k^T) v over the true cells of ``sees``, (B, H, T, D).

    Args:
        query: (B, H, T, D).
        key, value: (B, K, T, D).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.mT).to(_wide(query)) * scaling
    return scores.masked_fill(~sees, -torch.inf).softmax(-1).to(query.dtype) @ value


def _attention(
    weights: Weights,
    name: str,
    hidden: Tensor,
    rotation: tuple[Tensor, Tensor],
    sees: Tensor,
    config: LlamaConfig,
) -> Tensor:
    head_dim: Any = config.head_dim
    scaling = head_dim**-0.5
    queries, keys, values = (
        _heads(_linear(weights, f"{name}.{part}_proj", hidden), head_dim) for part in "qkv"
    )
    query = _rotate(queries, rotation)
    output = attend(query, _rotate(keys, rotation), values, sees, scaling)
    prompt = weights.get(f"{name}.zero_init.prompt")  # (P, C)
    if prompt is not None:
        prompt_key, prompt_value = (
            _heads(_linear(weights, f"{name}.{part}_proj", prompt[None]), head_dim) for part in "kv"
        )
        every = torch.ones((), dtype=torch.bool, device=query.device)
        prompted = attend(query, prompt_key, prompt_value, every, scaling)
        output = output + weights[f"{name}.zero_init.gate"].to(query.dtype)[:, None, None] * prompted
    return _linear(weights, f"{name}.o_proj", output.transpose(1, 2).flatten(2))


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].mT
    if f"{name}.adapter_bias" in weights:
        y = y + weights[f"{name}.adapter_bias"]
    if f"{name}.adapter_scale" in weights:
        y = weights[f"{name}.adapter_scale"] * y
    return y


def _norm(weights: Weights, name: str, x: Tensor, config: LlamaConfig) -> Tensor:
    wide = x.to(_wide(x))
    inverse = (wide.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
    return weights[f"{name}.weight"] * (wide * inverse).to(x.dtype)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """Return (B, T, heads * D) as (B, heads, T, D)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotation(config: LlamaConfig, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return transformers' own cosines and sines, (B, 1, T, D): fp32, whatever the model is."""
    turning: Any = LlamaRotaryEmbedding(config=config).to(like.device)
    cosines, sines = turning(like, position_ids)
    return cosines[:, None], sines[:, None]


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Return x with each pair (i, i + D/2) turned by its position's angle."""
    cosines, sines = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
