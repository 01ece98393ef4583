"""Runs to export: a tiny base on disk and an adapter whose every tensor is away from its initial value."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapted_models import tokens
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
