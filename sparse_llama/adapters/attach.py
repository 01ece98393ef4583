"""Adapters onto a LLaMA: what is added where, what trains, and under which names.

Nothing is found by its name: prompts, scales and norms are recognised by their module's type, so a base with
    biases or a
module called ``norm_something`` trains nothing by accident.
"""

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparse_llama.adapters.scale_bias import ScaleBiasLinear
from sparse_llama.adapters.zero_init import ATTENTION_NAME, ZeroInitAttention, register_zero_init_attention
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import ConfigError


def attach_adapters(model: LlamaForCausalLM, settings: AdapterSettings, *, seed: int = 42) -> None:
    """Add v1's prompts and gates, v2's scales and biases too, to ``model`` and freeze everything else.

    The adapted model computes what the base computes, to the bit, until it is trained. ``attach_attention``
    comes first.

    Args:
        seed: of the prompts, drawn in fp32 on the CPU from a generator per layer and then cast, so that they
            are the same on every rank, device and ZeRO stage.

    Raises:
        ConfigError: no layer is left to adapt.
    """
    layers = model.model.layers
    if settings.start_layer >= len(layers):
        raise ConfigError(
            f"sparse_llama.adapter.start_layer: {settings.start_layer} leaves no layer to adapt, the model "
            "has "
            f"{len(layers)} (0 to {len(layers) - 1}); use at most {len(layers) - 1}"
        )
    assert not any(isinstance(module, ZeroInitAttention) for module in model.modules()), (
        "adapters are attached already"
    )
    model.requires_grad_(False)
    if settings.version == "v2":
        _scale_every_linear(model)
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.weight.requires_grad_(True)
    for index in range(settings.start_layer, len(layers)):
        attention: Any = layers[index].self_attn
        prompt = _draw_prompt(settings.prompt_length, model.config.hidden_size, seed=seed, layer=index)
        weight = attention.k_proj.weight
        attention.zero_init = ZeroInitAttention(prompt.to(weight), num_heads=model.config.num_attention_heads)
    register_zero_init_attention()
    model.set_attn_implementation(ATTENTION_NAME)


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the names and parameters that train, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return fp32 copies, on the CPU, of what trains; for a model whose parameters are whole (not under
    ZeRO-3)."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in trainable_parameters(model)
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: prompts with ``weight_decay``, everything else without.

    Decay would pull a scale or a norm from 1 to 0, and a gate or a bias back to where it does nothing.
    """
    is_prompt = {id(module.prompt) for module in model.modules() if isinstance(module, ZeroInitAttention)}
    trainable = [parameter for _, parameter in trainable_parameters(model)]
    groups = [
        {
            "name": "prompts",
            "params": [parameter for parameter in trainable if id(parameter) in is_prompt],
            "weight_decay": weight_decay,
        },
        {
            "name": "gates, scales, biases and norms",
            "params": [parameter for parameter in trainable if id(parameter) not in is_prompt],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def first_trained_layer(model: LlamaForCausalLM) -> int:
    """Return the lowest decoder layer that trains; no gradient has to go below it. The number of layers if
    none trains."""
    layers = model.model.layers
    trained = (
        i
        for i, layer in enumerate(layers)
        if any(parameter.requires_grad for parameter in layer.parameters())
    )
    return next(trained, len(layers))


def _scale_every_linear(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, ScaleBiasLinear(child))


def _draw_prompt(num_tokens: int, width: int, *, seed: int, layer: int) -> torch.Tensor:
    """Return the (P, C) standard normal prompt of one layer, fp32."""
    digest = hashlib.sha256(f"zero_init prompt, seed {seed}, layer {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(num_tokens, width, generator=generator, dtype=torch.float32, device="cpu")
