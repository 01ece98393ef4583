"""LLaMA with LLaMA-Adapter v1 and v2 written out once more, from the formulas, in plain fp64 tensors.

No module, no kernel, no cache: each token attends by an explicit mask, the prompt by its own softmax. The
weights are a table by state-dict name; autograd gives the gradients.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig


def adapted_logits(
    weights: dict[str, Tensor],
    config: LlamaConfig,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Return the (B, T, V) logits; tokens attend within their document, a document starting at each position
    0, and where ``table``, (H, T, T) of a sparse layout, lets them."""
    num_tokens = input_ids.shape[1]
    if position_ids is None:
        position_ids = torch.arange(num_tokens).expand_as(input_ids)
    document = (position_ids == 0).cumsum(-1)
    token = torch.arange(num_tokens)
    visible = (token[:, None] >= token) & (document[:, :, None] == document[:, None, :])  # (B, T, T)
    visible = visible[:, None].expand(-1, config.num_attention_heads, -1, -1)  # (B, H, T, T)
    if table is not None:
        visible = visible & table
    hidden = weights["model.embed_tokens.weight"][input_ids]
    for index in range(config.num_hidden_layers):
        name = f"model.layers.{index}"
        normed = _norm(weights, f"{name}.input_layernorm", hidden, config)
        hidden = hidden + _attention(weights, f"{name}.self_attn", normed, visible, position_ids, config)
        normed = _norm(weights, f"{name}.post_attention_layernorm", hidden, config)
        gate = torch.nn.functional.silu(_linear(weights, f"{name}.mlp.gate_proj", normed))
        hidden = hidden + _linear(
            weights, f"{name}.mlp.down_proj", gate * _linear(weights, f"{name}.mlp.up_proj", normed)
        )
    return _linear(weights, "lm_head", _norm(weights, "model.norm", hidden, config))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross entropy: token t predicts label t + 1, -100 is ignored."""
    total = logits.new_zeros(())
    for row in range(labels.shape[0]):
        for token in range(labels.shape[1] - 1):
            if labels[row, token + 1] != -100:
                total = total - logits[row, token].log_softmax(-1)[labels[row, token + 1]]
    return total


def _attention(
    weights: dict[str, Tensor],
    name: str,
    hidden: Tensor,
    visible: Tensor,
    position_ids: Tensor,
    config: LlamaConfig,
) -> Tensor:
    queries = _rotate(
        _heads(_linear(weights, f"{name}.q_proj", hidden), config), position_ids, config
    )  # (B, H, T, D)
    keys = _rotate(_heads(_linear(weights, f"{name}.k_proj", hidden), config), position_ids, config)
    values = _heads(_linear(weights, f"{name}.v_proj", hidden), config)
    prompt = weights.get(f"{name}.zero_init.prompt")
    outputs = []
    for head in range(config.num_attention_heads):
        kv_head = head * config.num_key_value_heads // config.num_attention_heads
        query = queries[:, head] / config.head_dim**0.5
        scores = (query @ keys[:, kv_head].mT).masked_fill(~visible[:, head], float("-inf"))
        output = scores.softmax(-1) @ values[:, kv_head]
        if prompt is not None:
            prompt_key = _heads(_linear(weights, f"{name}.k_proj", prompt)[None], config)[
                0, kv_head
            ]  # (P, D)
            prompt_value = _heads(_linear(weights, f"{name}.v_proj", prompt)[None], config)[0, kv_head]
            gate = weights[f"{name}.zero_init.gate"][head]
            output = output + gate * ((query @ prompt_key.mT).softmax(-1) @ prompt_value)
        outputs.append(output)
    return _linear(weights, f"{name}.o_proj", torch.cat(outputs, dim=-1))


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = weights.get(f"{name}.weight", weights["model.embed_tokens.weight"])  # the head of a tied model
    y = x @ weight.mT
    if f"{name}.bias" in weights:
        y = y + weights[f"{name}.bias"]
    if f"{name}.adapter_scale" in weights:
        y = weights[f"{name}.adapter_scale"] * (y + weights[f"{name}.adapter_bias"])
    return y


def _norm(weights: dict[str, Tensor], name: str, x: Tensor, config: LlamaConfig) -> Tensor:
    return weights[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()


def _heads(x: Tensor, config: LlamaConfig) -> Tensor:
    return x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)


def _rotate(x: Tensor, position_ids: Tensor, config: LlamaConfig) -> Tensor:
    """Return x with each pair (i, i + D/2) turned by position * frequency i."""
    half = config.head_dim // 2
    angle = position_ids[:, None, :, None].to(x.dtype) * _frequencies(config, half, x.dtype)  # (B, 1, T, D/2)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
    )


def _frequencies(config: LlamaConfig, half: int, dtype: torch.dtype) -> Tensor:
    """Return theta^(-2i/D); Llama 3.1 divides those of long waves by a factor, with a ramp in between (Llama
    Team 2024, arXiv:2407.21783; ``apply_scaling`` of meta-llama/llama-models)."""
    rope: Any = config.rope_parameters
    frequency = rope["rope_theta"] ** (-torch.arange(half, dtype=dtype) / half)
    if rope["rope_type"] != "llama3":
        return frequency
    waves = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)  # in the first context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / rope["factor"]
