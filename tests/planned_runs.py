"""Runs to plan: configurations as files, and the shapes of known models."""

import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from sparse_llama.config.run import Overrides, Run, load_run

LLAMA_7B: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
SMALL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
FIXED = {
    "mode": "fixed",
    "block": 16,
    "num_local_blocks": 4,
    "num_global_blocks": 1,
    "attention": "unidirectional",
}


def llama(shape: dict[str, Any], **overrides: Any) -> LlamaConfig:
    return LlamaConfig(**(shape | overrides))


def document(
    num_tokens: int,
    version: str = "v1",
    *,
    memory: dict[str, Any] | None = None,
    checkpointing: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    precision: str = "bf16",
    rows: int = 1,
    **blocks: Any,
) -> dict[str, Any]:
    """Return a configuration document; ``blocks`` are DeepSpeed's and ``sparse_attention``."""
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "sparse_llama": {
            "seq_length": num_tokens,
            "adapter": {"version": version} | (adapter or {}),
            "memory": memory or {},
        },
    }
    if precision != "fp32":
        made[precision] = {"enabled": True}
    if checkpointing is not None:
        made["activation_checkpointing"] = checkpointing
    return made | blocks


def run_of(folder: Path, made: dict[str, Any], world_size: int = 1) -> Run:
    path = folder / "run.json"
    path.write_text(json.dumps(made))
    return load_run(path, Overrides(), world_size)
