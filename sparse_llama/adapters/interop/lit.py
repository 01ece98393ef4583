"""What lit-llama's and litgpt's adapter files share: ``transformer.h.{i}``, q, k and v in one linear layer,
and a vocabulary padded to a round number."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from sparse_llama.adapters.interop import rows
from sparse_llama.adapters.interop.ours import (
    LAST_NORM,
    NORMS,
    gate_name,
    head_dim,
    identity,
    linear_name,
    norm_name,
    outputs,
    prompt_name,
)
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import CheckpointError

PROMPT, GATE = "attn.adapter_wte.weight", "attn.gating_factor"
START_LAYER, PROMPT_LENGTH = 2, 10
"""Both programs' defaults; neither file says them."""
_QKV = ("q_proj", "k_proj", "v_proj")
_KINDS = ("adapter_scale", "adapter_bias")
_NAME = re.compile(r"transformer\.h\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Dialect:
    """One program's names and orders."""

    format: str
    fused: str
    """The linear layer of q, k and v."""
    modules: Mapping[str, str]
    """Its other linear layers, by ours."""
    norms: Mapping[str, str]
    """Its norms' weights, by our norms."""
    last_norm: str
    is_interleaved: bool
    """Whether q and k have interleaved rows."""


def to_ours(
    dialect: Dialect, tensors: Mapping[str, torch.Tensor], base: LlamaConfig, source: str
) -> dict[str, torch.Tensor]:
    """Return a file's tensors under our names, in our row order.

    Raises:
        CheckpointError: a tensor is none of an adapter's, or q, k and v are not this base's.
    """
    modules = {name: projection for projection, name in dialect.modules.items()}
    norms = {name: norm for norm, name in dialect.norms.items()}
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        layer, rest = (int(found[1]), found[2]) if found else (-1, name)
        module, _, kind = rest.rpartition(".")
        if name == dialect.last_norm:
            ours[LAST_NORM] = tensor
        elif name in [f"lm_head.{kind}" for kind in _KINDS]:
            ours[name] = _stripped(tensor, base, name, source)
        elif rest == PROMPT:
            ours[prompt_name(layer)] = tensor
        elif rest == GATE:
            ours[gate_name(layer)] = tensor.flatten()
        elif rest in norms:
            ours[norm_name(layer, norms[rest])] = tensor
        elif module == dialect.fused and kind in _KINDS:
            parts = _split(dialect, tensor, base, name, source)
            ours |= {f"{linear_name(layer, projection)}.{kind}": part for projection, part in parts.items()}
        elif module in modules and kind in _KINDS:
            ours[f"{linear_name(layer, modules[module])}.{kind}"] = tensor
        else:
            raise CheckpointError(
                f"{source}: {name} is no tensor of a {dialect.format} adapter; save the adapter's tensors "
                "alone"
            )
    return ours


def to_theirs(
    dialect: Dialect,
    settings: AdapterSettings,
    tensors: Mapping[str, torch.Tensor],
    base: LlamaConfig,
    *,
    padded_vocabulary: int,
    is_whole: bool,
) -> dict[str, torch.Tensor]:
    """Return all of an adapter but its gates under a program's names, in its row order.

    Args:
        is_whole: write the scales and biases that ours lacks, as ones and zeros: a program that loads
            strictly needs every one of them.
    """
    sizes = outputs(base)
    theirs: dict[str, torch.Tensor] = {}
    for layer in settings.prompt_layers(base.num_hidden_layers):
        theirs[f"transformer.h.{layer}.{PROMPT}"] = tensors[prompt_name(layer)]
    for layer in range(base.num_hidden_layers):
        prefix = f"transformer.h.{layer}"
        for kind in _KINDS:
            held = {name: tensors.get(f"{linear_name(layer, name)}.{kind}") for name in sizes}
            if is_whole or any(held[name] is not None for name in _QKV):
                parts = {name: _or_identity(held[name], kind, sizes[name]) for name in _QKV}
                theirs[f"{prefix}.{dialect.fused}.{kind}"] = _fused(dialect, parts, base)
            for projection, module in dialect.modules.items():
                if is_whole or held[projection] is not None:
                    whole = _or_identity(held[projection], kind, sizes[projection])
                    theirs[f"{prefix}.{module}.{kind}"] = whole
        for norm in NORMS:
            if (weight := tensors.get(norm_name(layer, norm))) is not None:
                theirs[f"{prefix}.{dialect.norms[norm]}"] = weight
    for kind in _KINDS:
        head = tensors.get(f"lm_head.{kind}")
        if is_whole or head is not None:
            padding = identity(kind, padded_vocabulary - base.vocab_size)
            theirs[f"lm_head.{kind}"] = torch.cat([_or_identity(head, kind, base.vocab_size), padding])
    if LAST_NORM in tensors:
        theirs[dialect.last_norm] = tensors[LAST_NORM]
    return theirs


def default_notices(dialect: Dialect, settings: AdapterSettings, base: LlamaConfig) -> tuple[str, ...]:
    """Return what its user has to tell the program, because no file of its does."""
    needed = {
        "adapter_start_layer": (settings.prompt_layers(base.num_hidden_layers).start, START_LAYER),
        "adapter_prompt_length": (settings.prompt_length, PROMPT_LENGTH),
    }
    told = [f"{key} = {value}" for key, (value, default) in needed.items() if value != default]
    if not told:
        return ()
    return (f"{dialect.format}'s model has to be made with {' and '.join(told)}: its files do not say so",)


def _split(
    dialect: Dialect, vector: torch.Tensor, base: LlamaConfig, name: str, source: str
) -> dict[str, torch.Tensor]:
    sizes = [outputs(base)[projection] for projection in _QKV]
    if vector.numel() != sum(sizes):
        raise CheckpointError(
            f"{source}: {name} has {vector.numel()} entries, q, k and v of this base have {sum(sizes)}; it "
            "was trained on another base"
        )
    parts: dict[str, torch.Tensor] = dict(zip(_QKV, vector.split(sizes), strict=True))
    if dialect.is_interleaved:
        parts |= {projection: rows.halves(parts[projection], head_dim(base)) for projection in _QKV[:2]}
    return parts


def _fused(dialect: Dialect, parts: dict[str, torch.Tensor], base: LlamaConfig) -> torch.Tensor:
    if dialect.is_interleaved:
        parts |= {projection: rows.interleaved(parts[projection], head_dim(base)) for projection in _QKV[:2]}
    return torch.cat([parts[projection] for projection in _QKV])


def _stripped(vector: torch.Tensor, base: LlamaConfig, name: str, source: str) -> torch.Tensor:
    if vector.numel() < base.vocab_size:
        raise CheckpointError(
            f"{source}: {name} has {vector.numel()} entries, this base's vocabulary has {base.vocab_size}; "
            "it was trained on another base"
        )
    return vector[: base.vocab_size]


def _or_identity(tensor: torch.Tensor | None, kind: str, size: int) -> torch.Tensor:
    return identity(kind, size) if tensor is None else tensor
