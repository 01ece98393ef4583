"""Runs to export: a tiny base on disk and an adapter whose every tensor is away from its initial value."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapted_models import tokens
from oracles.adapter_formula import adapted_logits
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sparse_llama.config.bundled import MODELS

BUNDLED = MODELS["bundled:tiny-llama"]
VOCAB_SIZE = 1344  # of the bundled tokenizer
MASTER_LENGTH = 64  # what adapt() makes layouts for
LAYOUT: dict[str, Any] = {
    "mode": "fixed",
    "block": 4,
    "num_local_blocks": 4,
    "num_global_blocks": 1,
    "attention": "unidirectional",
    "different_layout_per_head": True,
    "num_different_global_patterns": 2,
}
"""Windows of 16 tokens; the heads see two different blocks of the windows before."""

LLAMA_3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
"""Rotary settings: of the wavelengths some are kept, one is in between, others are stretched."""


@dataclass(frozen=True)
class TrainedRun:
    """A run's folder, its base's folder, and the adapted model in fp32."""

    folder: Path
    base: Path
    model: LlamaForCausalLM


def ids(num_tokens: int = 40, num_rows: int = 2) -> torch.Tensor:
    """Return (B, T) token ids."""
    return tokens(num_rows, num_tokens, VOCAB_SIZE)


def open_export(folder: Path) -> Any:
    """Return the model as its users open it, running the folder's code."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def formula(run: TrainedRun, variant: dict[str, Any], *, without: tuple[str, ...] = ()) -> torch.Tensor:
    """Return the fp64 logits of the adapter's formulas, what a variant lacks filled in by what does
    nothing.

    Args:
        without: endings of the names of tensors that are taken as zero.
    """
    weights = {name: tensor.detach().double() for name, tensor in run.model.state_dict().items()}
    for name in list(weights):
        module, _, kind = name.rpartition(".")
        if kind == "adapter_scale":
            weights.setdefault(f"{module}.adapter_bias", torch.zeros_like(weights[name]))
        if kind == "adapter_bias":
            weights.setdefault(f"{module}.adapter_scale", torch.ones_like(weights[name]))
        if kind == "gate" and variant.get("gate_activation") == "tanh":
            weights[name] = weights[name].tanh()
        if kind == "gate":
            weights[name] = weights[name].expand(run.model.config.num_attention_heads)
    for name in weights:
        if name.endswith(without):
            weights[name] = torch.zeros_like(weights[name])
    return adapted_logits(weights, run.model.config, ids())
