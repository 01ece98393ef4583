"""PEFT's ``adaption_prompt`` folder: ``adapter_config.json`` and ``adapter_model.safetensors``
(``peft/tuners/adaption_prompt``, 0.21).

One gate per layer, the last ``adapter_layers`` layers, v1 only. What it adds goes through ``o_proj`` apart
from the attention's own output, so on a base with a bias there it computes another function.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from sparse_llama.adapters.interop.files import PEFT_CONFIG, StoredAdapter
from sparse_llama.adapters.interop.gates import linear_gates
from sparse_llama.adapters.interop.ours import (
    ForeignAdapter,
    complete,
    gate_name,
    head_dim,
    is_identity,
    prompt_name,
)
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import CheckpointError, ExportError

FORMAT = "peft"
WEIGHTS_NAME = "adapter_model.safetensors"
_NAME = re.compile(r"(?:base_model\.model\.)?(?:model\.)?layers\.(\d+)\.self_attn\.adaption_(prompt|gate)")


def matches(stored: StoredAdapter) -> bool:
    """Whether these are tensors of PEFT's adaption prompt."""
    return any(".adaption_" in name for name in stored.tensors)


def named_base(stored: StoredAdapter) -> str | None:
    """Return the base that the file names."""
    return (stored.peft_config or {}).get("base_model_name_or_path") or None


def read(stored: StoredAdapter, base: LlamaConfig) -> ForeignAdapter:
    """Return PEFT's adapter as ours: v1 on the top layers with one gate per layer."""
    source = str(stored.path)
    if base.attention_bias:
        raise CheckpointError(
            f"{source}: this base's o_proj has a bias, which PEFT adds twice in adapted layers; what such an "
            "adapter learnt means nothing elsewhere: train it again here"
        )
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in stored.tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise CheckpointError(
                f"{source}: {name} is no tensor of PEFT's adaption prompt on a LLaMA; save the adapter alone"
            )
        layer = int(found[1])
        if found[2] == "prompt":
            ours[prompt_name(layer)] = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor  # (1, P, C)
        else:
            ours[gate_name(layer)] = tensor.flatten()
    settings, tensors = complete(ours, base, source=source)
    adapted = settings.prompt_layers(base.num_hidden_layers)
    settings = settings.model_copy(update={"start_layer": None, "top_layers": len(adapted), "gate": "scalar"})
    base_model = (stored.peft_config or {}).get("base_model_name_or_path") or None
    return ForeignAdapter(FORMAT, settings, tensors, (), base_model)


def to_tensors(
    settings: AdapterSettings, tensors: Mapping[str, torch.Tensor], base: LlamaConfig
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Return an adapter of ours as PEFT's tensors, and the notices.

    Raises:
        ExportError: PEFT cannot hold it, or computes another function on this base.
    """
    _check_base(base)
    layers = settings.prompt_layers(base.num_hidden_layers)
    prompts_and_gates = {name(layer) for layer in layers for name in (prompt_name, gate_name)}
    for name in sorted(tensors.keys() - prompts_and_gates):
        if not is_identity(name, tensors[name]):
            raise ExportError(
                f"--format {FORMAT}: the adapter has {name}, and PEFT's adaption prompt is v1 only; train "
                'with sparse_llama.adapter.version "v1", or use another format'
            )
    gates, notices = linear_gates(FORMAT, settings, tensors, layers)
    theirs: dict[str, torch.Tensor] = {}
    for layer, gate in gates.items():
        if not bool((gate == gate[0]).all()):
            raise ExportError(
                f"--format {FORMAT}: the heads of layer {layer} have gates from {float(gate.min()):.4g} to "
                f"{float(gate.max()):.4g}, and PEFT has one gate per layer; train with "
                'sparse_llama.adapter.gate "scalar", or use another format'
            )
        prefix = f"base_model.model.model.layers.{layer}.self_attn"
        theirs[f"{prefix}.adaption_prompt"] = tensors[prompt_name(layer)][None]  # (1, P, C)
        theirs[f"{prefix}.adaption_gate"] = gate[:1]
    return theirs, notices


def write(
    folder: Path,
    settings: AdapterSettings,
    tensors: Mapping[str, torch.Tensor],
    base: LlamaConfig,
    base_model: str,
) -> tuple[str, ...]:
    """Write the two files into ``folder`` and return the notices."""
    theirs, notices = to_tensors(settings, tensors, base)
    whole = {name: tensor.contiguous().clone() for name, tensor in theirs.items()}
    save_file(whole, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = {
        "adapter_layers": len(settings.prompt_layers(base.num_hidden_layers)),
        "adapter_len": settings.prompt_length,
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "peft_type": "ADAPTION_PROMPT",
        "revision": None,
        "target_modules": "self_attn",
        "task_type": "CAUSAL_LM",
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return notices


def _check_base(base: LlamaConfig) -> None:
    if base.attention_bias:
        raise ExportError(
            f"--format {FORMAT}: this base's o_proj has a bias (attention_bias), which PEFT adds twice in "
            "adapted layers; use --format merged or native"
        )
    if head_dim(base) * base.num_attention_heads != base.hidden_size:
        raise ExportError(
            f"--format {FORMAT}: PEFT takes heads to be hidden_size / num_attention_heads = "
            f"{base.hidden_size / base.num_attention_heads:g} wide, this base's are {head_dim(base)}; use "
            "--format merged or native"
        )
