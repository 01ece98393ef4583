"""Adapted models away from their start, where a wrong formula shows."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from sparse_llama.adapters.attach import attach_adapters, trainable_parameters
from sparse_llama.adapters.weights import AdapterFile, BaseModelReference, write_adapter_folder
from sparse_llama.attention.interface import attach_attention, plan_attention
from sparse_llama.config.layers import LayerSparsities
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.config.sparsity import Sparsity, parse_sparsity
from sparse_llama.model.llama import load_llama


def adapt(
    model: LlamaForCausalLM,
    version: str,
    *,
    prompt_length: int = 3,
    start_layer: int | None = 2,
    is_trained: bool = True,
    sparsity: Sparsity | None = None,
    dense_layers: tuple[int, ...] | None = None,
    noise: float = 0.4,
    **settings: Any,
) -> LlamaForCausalLM:
    """Return ``model`` with attention and adapters; trained ones have every tensor away from its initial
    value.

    Args:
        settings: of the adapter's variant.
    """
    plan = plan_attention(
        LayerSparsities(sparsity, (), dense_layers).resolve(model.config.num_hidden_layers),
        num_heads=model.config.num_attention_heads,
        master_length=64,
        seed=0,
    )
    attach_attention(model, plan)
    prompts = {"prompt_length": prompt_length, "start_layer": start_layer}
    attach_adapters(model, AdapterSettings(version=version, **prompts, **settings), seed=1)  # type: ignore[arg-type]
    return shake(model, noise) if is_trained else model


def shake(model: LlamaForCausalLM, noise: float = 0.4) -> LlamaForCausalLM:
    """Move every trainable tensor of ``model`` away from its value, and return it."""
    generator = torch.Generator().manual_seed(3)
    for _, parameter in trainable_parameters(model):
        parameter.data += noise * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def trainable_state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Return fp32 copies, on the CPU, of what trains."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in trainable_parameters(model)
    }


def save_adapted(folder: Path, base: str, *, version: str, block: dict[str, Any] | None = None) -> None:
    """Write a trained adapter of ``base``, sparse by ``block`` if that is given, as a run leaves it."""
    sparsity = None if block is None else parse_sparsity(block)
    loaded = load_llama(base, dtype=torch.float32).model
    model = adapt(loaded, version, start_layer=1, sparsity=sparsity, noise=0.05)
    file = AdapterFile(
        base_model=BaseModelReference(path=base),
        adapter=AdapterSettings(version=version, prompt_length=3, start_layer=1),  # type: ignore[arg-type]
        sparse_attention=block,
        master_length=512,
        seed=0,
        seq_length=256,
        dtype="float32",
        trainable_parameters=sum(parameter.numel() for _, parameter in trainable_parameters(model)),
        version="0",
    )
    write_adapter_folder(folder, trainable_state(model), file)


def tokens(num_rows: int = 2, num_tokens: int = 9, vocabulary: int = 61) -> torch.Tensor:
    return torch.randint(vocabulary, (num_rows, num_tokens), generator=torch.Generator().manual_seed(5))


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Return (B, T) labels as what each token predicts: the label of the next one, at the end nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)
