"""Our side of an exchange: an adapter's tensors by name and shape, and the settings that they belong to.

``C`` model width, ``D`` head width, ``H`` query heads, ``K`` key/value heads, ``P`` prompt tokens.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from sparse_llama.config.settings import PROJECTIONS, AdapterSettings
from sparse_llama.errors import CheckpointError

NORMS = ("input_layernorm", "post_attention_layernorm")
LAST_NORM = "model.norm.weight"
_KINDS = ("adapter_scale", "adapter_bias")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class ForeignAdapter:
    """Another program's adapter under our names: fp32, rows in transformers' order."""

    format: str
    settings: AdapterSettings
    tensors: dict[str, torch.Tensor]
    notices: tuple[str, ...]
    """What whoever uses it has to know, such as that its own program computes another function from it."""
    base_model: str | None
    """What the file says of its base."""


def prompt_name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.zero_init.prompt"


def gate_name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.zero_init.gate"


def linear_name(layer: int, projection: str) -> str:
    """Return the name of a linear layer, to which ``.adapter_scale`` or ``.adapter_bias`` is added."""
    block = "self_attn" if projection in _ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{projection}"


def norm_name(layer: int, norm: str) -> str:
    return f"model.layers.{layer}.{norm}.weight"


def layer_of(name: str) -> int | None:
    """Return the decoder layer that a tensor of ours belongs to; None for the head and the last norm."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def head_dim(base: LlamaConfig) -> int:
    """Return D."""
    return base.head_dim or base.hidden_size // base.num_attention_heads


def num_kv_heads(base: LlamaConfig) -> int:
    """Return K."""
    return base.num_key_value_heads or base.num_attention_heads


def outputs(base: LlamaConfig) -> dict[str, int]:
    """Return the outputs of each linear layer, by the last part of its name."""
    width, inner = base.hidden_size, base.intermediate_size
    rows, kv_rows = base.num_attention_heads * head_dim(base), num_kv_heads(base) * head_dim(base)
    return {
        "q_proj": rows,
        "k_proj": kv_rows,
        "v_proj": kv_rows,
        "o_proj": width,
        "gate_proj": inner,
        "up_proj": inner,
        "down_proj": width,
        "lm_head": base.vocab_size,
    }


def adapter_shapes(settings: AdapterSettings, base: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of an adapter on a base."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes, width = outputs(base), base.hidden_size
    gates = 1 if settings.gate == "scalar" else base.num_attention_heads
    parts = {"adapter_scale": settings.scaled, "adapter_bias": settings.biased}
    for layer in settings.prompt_layers(base.num_hidden_layers):
        shapes[prompt_name(layer)] = (settings.prompt_length, width)
        shapes[gate_name(layer)] = (gates,)
    for layer in settings.adapted_layers(base.num_hidden_layers):
        for kind, projections in parts.items():
            for projection in (name for name in PROJECTIONS if name in projections):
                shapes[f"{linear_name(layer, projection)}.{kind}"] = (sizes[projection],)
        if settings.trains_norms:
            shapes |= {norm_name(layer, norm): (width,) for norm in NORMS}
    shapes |= {f"lm_head.{kind}": (sizes["lm_head"],) for kind in _KINDS if "lm_head" in parts[kind]}
    return shapes | ({LAST_NORM: (width,)} if settings.trains_norms else {})


def complete(
    tensors: Mapping[str, torch.Tensor], base: LlamaConfig, *, source: str, gate_activation: str = "none"
) -> tuple[AdapterSettings, dict[str, torch.Tensor]]:
    """Return the settings that ``tensors`` belong to, and fp32 copies of them.

    Raises:
        CheckpointError: they are of no settings: something is missing, or of another base.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{source}: {name} is {dtype}, an adapter's tensors are floats; copy it again"
            )
    settings = _settings_of(tensors, base, source, gate_activation)
    check(settings, tensors, base, source=source)
    return settings, {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in tensors.items()
    }


def check(
    settings: AdapterSettings, tensors: Mapping[str, torch.Tensor], base: LlamaConfig, *, source: str
) -> None:
    """Refuse tensors that are not exactly those of an adapter on ``base``.

    Raises:
        CheckpointError: one is missing, too many or of another shape.
    """
    shapes = adapter_shapes(settings, base)
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or extra:
        what = f"has no {missing[0]}" if missing else f"has {extra[0]}"
        raise CheckpointError(
            f"{source}: {what}, unlike its other layers; every adapted layer has the same parts, so this is "
            "not the whole adapter or not this base's: copy or save it again"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(tensors[name].shape)}, this base needs {list(shape)}; it "
                "was trained on another base"
            )


def is_identity(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is a scale of ones or a bias of zeros, which no format has to hold."""
    neutral = {"adapter_scale": 1.0, "adapter_bias": 0.0}.get(name.rsplit(".", 1)[-1])
    return neutral is not None and bool((tensor == neutral).all())


def identity(kind: str, size: int) -> torch.Tensor:
    """Return the scale or the bias that does nothing."""
    return torch.ones(size) if kind.endswith("scale") else torch.zeros(size)


def _settings_of(
    tensors: Mapping[str, torch.Tensor], base: LlamaConfig, source: str, gate_activation: str
) -> AdapterSettings:
    num_layers = base.num_hidden_layers
    layers = {layer for name in tensors if (layer := layer_of(name)) is not None}
    prompted = sorted(layer for layer in layers if prompt_name(layer) in tensors)
    if not prompted:
        raise CheckpointError(f"{source}: no adaption prompt in it; an adapter has one in its last layers")
    if max(layers) != num_layers - 1:
        raise CheckpointError(
            f"{source}: its last adapted layer is {max(layers)}, this base's last layer is {num_layers - 1}; "
            "it was trained on another base"
        )
    first = prompted[0]
    parts: dict[str, object] = {}
    if tensors.keys() - {name(layer) for layer in prompted for name in (prompt_name, gate_name)}:
        parts = {
            "version": "v2",
            "scale": _projections(tensors, num_layers - 1, "adapter_scale"),
            "bias": _projections(tensors, num_layers - 1, "adapter_bias"),
            "norm": LAST_NORM in tensors,
            "lm_head": _head(tensors),
        }
    is_top = bool(parts) and min(layers) == first > 0
    gates = [tensors[gate_name(layer)] for layer in prompted if gate_name(layer) in tensors]
    is_scalar = base.num_attention_heads > 1 and all(gate.shape == (1,) for gate in gates)
    return AdapterSettings.model_validate(
        {
            "version": "v1",
            "prompt_length": tensors[prompt_name(first)].shape[0],
            "top_layers" if is_top else "start_layer": num_layers - first if is_top else first,
            "gate": "scalar" if is_scalar else "per_head",
            "gate_activation": gate_activation,
            **parts,
        }
    )


def _projections(tensors: Iterable[str], layer: int, kind: str) -> bool | tuple[str, ...]:
    found = tuple(name for name in PROJECTIONS if f"{linear_name(layer, name)}.{kind}" in tensors)
    return True if found == PROJECTIONS else found or False


def _head(tensors: Iterable[str]) -> bool | str:
    found = [kind.removeprefix("adapter_") for kind in _KINDS if f"lm_head.{kind}" in tensors]
    return bool(found) if len(found) != 1 else found[0]
