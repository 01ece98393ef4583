"""Adapters onto a LLaMA: what is added where, what trains, and under which names.

Nothing is found by its name: layers, scales and norms are recognised by their module's type, so a base with
biases or a module called ``norm_something`` trains nothing by accident. Modules are wrapped once, over the
base's own parameters; whose prompts, scales, biases and norms they hold is the bank's business.
"""

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from sparse_llama.adapters.bank import DEFAULT, AdapterBank, NamedAdapter, bank_of
from sparse_llama.adapters.mlp import AdaptedMLP
from sparse_llama.adapters.norm import AdaptedRMSNorm
from sparse_llama.adapters.scale_bias import Becomes, ScaleBiasLinear
from sparse_llama.adapters.zero_init import ATTENTION_NAME, ZeroInitAttention, register_zero_init_attention
from sparse_llama.attention.interface import AttentionPlan, attach_attention
from sparse_llama.config.settings import AdapterSettings, TemplateName
from sparse_llama.errors import ConfigError

_BECOMES: dict[str, Becomes] = {
    "q_proj": "rotated",
    "k_proj": "rotated",
    "v_proj": "kept",
    "o_proj": "added",
    "gate_proj": "product",
    "up_proj": "product",
    "down_proj": "added",
}


def attach_adapters(
    model: LlamaForCausalLM,
    settings: AdapterSettings,
    *,
    seed: int = 42,
    name: str = DEFAULT,
    dtype: torch.dtype = torch.float32,
    plan: AttentionPlan | None = None,
    template: TemplateName = "alpaca",
) -> None:
    """Add an adapter to ``model``, make it the active one, and freeze everything else.

    The adapted model computes what the base computes, to the bit, until it is trained. A model that attends
    by no plan yet (``attach_attention``) attends fully.

    Args:
        seed: of the prompts, drawn in fp32 on the CPU from a generator per layer and then cast, so that they
            are the same on every rank, device and ZeRO stage.
        name: to tell several adapters of one base apart; one of the same name is replaced.
        dtype: of the adapter's parameters. In bf16 a scale near 1 cannot move by lr x gradient, so whoever
            trains it in bf16 has to keep fp32 masters, as DeepSpeed does.
        plan: how the model attends while this adapter is active; None is as it does now.
        template: of the prompts that it was or will be trained with, for ``save_adapter`` to note.

    Raises:
        ConfigError: no layer is left to adapt, or more are asked for than there are.
    """
    _check_layers(settings, len(model.model.layers))
    present = getattr(model.model.layers[0].self_attn, "attention_plan", None)
    if present is None:
        present = AttentionPlan((None,) * len(model.model.layers))
        attach_attention(model, present)
    bank = bank_of(model)
    if bank is None:
        model.requires_grad_(False)
        bank = AdapterBank(model, present)
    _wrap(model, settings)
    parameters = _new_parameters(model, settings, bank, seed=seed, dtype=dtype)
    bank.add(model, name, NamedAdapter(settings, parameters, plan or bank.base_plan, seed, template))
    register_zero_init_attention()
    model.set_attn_implementation(ATTENTION_NAME)


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the names and parameters that train, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


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


def _check_layers(settings: AdapterSettings, num_layers: int) -> None:
    if settings.top_layers is not None and settings.top_layers > num_layers:
        raise ConfigError(
            f"sparse_llama.adapter.top_layers: {settings.top_layers} of a model with {num_layers} layers; "
            f"use at most {num_layers}"
        )
    prompted = settings.prompt_layers(num_layers)
    if not prompted:
        raise ConfigError(
            f"sparse_llama.adapter.start_layer: {prompted.start} leaves no layer to adapt, the model has "
            f"{num_layers} (0 to {num_layers - 1}); use at most {num_layers - 1}"
        )


def _wrap(model: LlamaForCausalLM, settings: AdapterSettings) -> None:
    """Put our modules, over the base's own parameters, where the adapter has a part and has none yet."""
    layers: Any = model.model.layers
    for index in settings.adapted_layers(len(layers)):
        _wrap_parts(layers[index], settings)
    if _keeps_norms_input(settings) and type(model.model.norm) is LlamaRMSNorm:
        model.model.norm = AdaptedRMSNorm(model.model.norm)
    if "lm_head" in settings.scaled | settings.biased and type(model.lm_head) is nn.Linear:
        model.lm_head = ScaleBiasLinear(model.lm_head, becomes="logits")
    for index in settings.prompt_layers(len(layers)):
        attention = layers[index].self_attn
        if not hasattr(attention, "zero_init"):
            attention.zero_init = ZeroInitAttention(model.config.num_attention_heads)


def _keeps_norms_input(settings: AdapterSettings) -> bool:
    """Whether a norm has to keep its input: to train, or for the scales after it, which would keep its
    output."""
    return settings.trains_norms or bool(settings.scaled)


def _wrap_parts(module: nn.Module, settings: AdapterSettings) -> None:
    for name, child in list(module.named_children()):
        wrapped = child
        if type(child) is LlamaMLP and settings.scaled:
            wrapped = AdaptedMLP(child)
        elif type(child) is LlamaRMSNorm and _keeps_norms_input(settings):
            wrapped = AdaptedRMSNorm(child)
        elif type(child) is nn.Linear and name in settings.scaled | settings.biased:
            wrapped = ScaleBiasLinear(child, becomes=_BECOMES[name])
        if wrapped is not child:
            setattr(module, name, wrapped)
        _wrap_parts(wrapped, settings)


def _new_parameters(
    model: LlamaForCausalLM,
    settings: AdapterSettings,
    bank: AdapterBank,
    *,
    seed: int,
    dtype: torch.dtype,
) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters at their start, by their names in the model and in its order."""
    num_layers = len(model.model.layers)
    adapted = {f"model.layers.{index}." for index in settings.adapted_layers(num_layers)}
    prompted = {f"model.layers.{index}." for index in settings.prompt_layers(num_layers)}
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        layer = path[: path.find(".", len("model.layers.")) + 1] if path.startswith("model.layers.") else None
        if isinstance(module, ZeroInitAttention) and layer in prompted:
            found |= _new_prompt(path, model, settings, seed=seed, dtype=dtype)
        if layer is not None and layer not in adapted:
            continue
        if isinstance(module, AdaptedRMSNorm) and settings.trains_norms:
            found[f"{path}.weight"] = bank.new_norm(f"{path}.weight", module, dtype)
        elif isinstance(module, ScaleBiasLinear):
            kind = path.rpartition(".")[2]
            parts = module.new_parameters(kind in settings.scaled, kind in settings.biased)
            found |= {f"{path}.{part}": _cast(parameter, dtype) for part, parameter in parts.items()}
    return found


def _new_prompt(
    path: str, model: LlamaForCausalLM, settings: AdapterSettings, *, seed: int, dtype: torch.dtype
) -> dict[str, nn.Parameter]:
    attention: Any = model.get_submodule(path.rpartition(".")[0])
    width = model.config.hidden_size
    prompt = _draw_prompt(settings.prompt_length, width, seed=seed, layer=attention.layer_idx)
    num_gates = model.config.num_attention_heads if settings.gate == "per_head" else 1
    device = attention.k_proj.weight.device
    return {
        f"{path}.prompt": nn.Parameter(prompt.to(device, dtype)),
        f"{path}.gate": nn.Parameter(torch.zeros(num_gates, dtype=dtype, device=device)),
    }


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return parameter if parameter.dtype == dtype else nn.Parameter(parameter.detach().to(dtype))


def _draw_prompt(num_tokens: int, width: int, *, seed: int, layer: int) -> torch.Tensor:
    """Return the (P, C) standard normal prompt of one layer, fp32."""
    digest = hashlib.sha256(f"zero_init prompt, seed {seed}, layer {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(num_tokens, width, generator=generator, dtype=torch.float32, device="cpu")
