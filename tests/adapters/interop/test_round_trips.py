"""Ours to another program's file and back, and theirs to ours and back: the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import shake, trainable_state
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.adapters.attach import attach_adapters
from sparse_llama.adapters.interop import read_foreign, write_foreign
from sparse_llama.config.settings import AdapterSettings

MHA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}
BASES: dict[str, dict[str, Any]] = {
    "mha": MHA,
    "gqa": {"num_key_value_heads": 2, "head_dim": 8},
    "wide heads": {"num_key_value_heads": 2, "head_dim": 10},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32},
    "narrow heads": MHA | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4},
    "no padding": MHA | {"vocab_size": 64},
    "six layers": MHA | {"num_hidden_layers": 6},
    "base biases": {"attention_bias": True, "mlp_bias": True},
}
TEXT = {"scale": False, "bias": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "lm_head": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "v1": {"version": "v1"},
    "v1 scalar": {"version": "v1", "gate": "scalar"},
    "v1 tanh": {"version": "v1", "gate_activation": "tanh"},
    "v1 all layers": {"version": "v1", "start_layer": 0, "prompt_length": 5},
    "v1 tanh all layers": {
        "version": "v1",
        "gate_activation": "tanh",
        "start_layer": 0,
        "prompt_length": 5,  # 20 or 30 rows, which could be two or three prompts of the usual 10
    },
    "v1 top": {"version": "v1", "top_layers": 1},
    "v2": {"version": "v2"},
    "v2 scalar": {"version": "v2", "gate": "scalar"},
    "v2 top": {"version": "v2", "top_layers": 1},
    "v2 text": TEXT | {"version": "v2", "gate_activation": "tanh"},
    "v2 text top": TEXT | {"version": "v2", "gate_activation": "tanh", "top_layers": 2},
    "v2 text all layers": TEXT
    | {"version": "v2", "gate_activation": "tanh", "start_layer": 0, "prompt_length": 5},
    "v2 no norms": {"version": "v2", "norm": False},
    "v2 norms only": {"version": "v2", "scale": False, "bias": False},
    "v2 scales": {"version": "v2", "bias": False, "lm_head": "scale"},
    "v2 head bias": {"version": "v2", "scale": False, "bias": ["q_proj"], "lm_head": "bias"},
}
EXACT = {
    "peft": (["mha", "gqa", "one head", "six layers"], ["v1 scalar"]),
    "lit-llama": (
        ["mha", "one head", "narrow heads", "no padding", "six layers"],
        ["v1", "v1 scalar", "v1 all layers", "v1 top", "v2", "v2 scalar", "v2 top", "v2 no norms"],
    ),
    "litgpt": (
        [*BASES],
        ["v1", "v1 all layers", "v1 top", "v2", "v2 top", "v2 no norms"],
    ),
    "llama-adapter": (
        ["mha", "one head", "narrow heads", "six layers"],
        ["v1 tanh", "v1 tanh all layers", "v2 text", "v2 text top", "v2 text all layers"],
    ),
}
Make = Callable[..., LlamaForCausalLM]


def adapter(make: Make, base: dict[str, Any], **settings: Any) -> tuple[Any, AdapterSettings, dict[str, Any]]:
    """Return a base's configuration, the settings, and a trained adapter's tensors."""
    model = make(**base)
    parsed = AdapterSettings.parse({"prompt_length": 3} | settings)
    attach_adapters(model, parsed, seed=1)
    return model.config, parsed, trainable_state(shake(model))


def meaning(settings: AdapterSettings, config: LlamaConfig) -> tuple[object, ...]:
    """Return what settings say, however they are written."""
    num_layers = config.num_hidden_layers
    gate = settings.gate if config.num_attention_heads > 1 else "one head's"
    return (
        *(settings.prompt_length, gate, settings.gate_activation),
        *(settings.scaled, settings.biased, settings.trains_norms),
        *(settings.prompt_layers(num_layers), settings.adapted_layers(num_layers)),
    )


@pytest.mark.parametrize(
    ("format", "base", "variant"),
    [
        (format, base, variant)
        for format, (bases, held) in EXACT.items()
        for base in bases
        for variant in held
    ],
)
def test_an_adapter_comes_back_with_its_bits_and_its_settings(tiny_llama, tmp_path, format, base, variant):
    config, settings, tensors = adapter(tiny_llama, BASES[base], **VARIANTS[variant])
    write_foreign(format, tmp_path, settings, tensors, config, base_model="a/base")
    back = read_foreign(tmp_path, config)
    assert back.format == format
    assert meaning(back.settings, config) == meaning(settings, config)
    assert back.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back.tensors[name], tensor), name


@pytest.mark.parametrize("variant", ["v2 norms only", "v2 scales", "v2 head bias", "v2 text"])
@pytest.mark.parametrize("format", ["lit-llama", "litgpt"])
def test_what_a_fused_or_strict_file_adds_does_nothing(tiny_llama, tmp_path, format, variant):
    settings = VARIANTS[variant] | {"gate_activation": "none"}
    config, parsed, tensors = adapter(tiny_llama, MHA, **settings)
    write_foreign(format, tmp_path, parsed, tensors, config, base_model="a/base")
    back = read_foreign(tmp_path, config).tensors
    for name in tensors:
        assert torch.equal(back[name], tensors[name]), name
    for name in back.keys() - tensors.keys():
        assert bool((back[name] == (1 if name.endswith("adapter_scale") else 0)).all()), name
        assert format == "litgpt" or any(part in name for part in ("q_proj", "k_proj", "v_proj"))


@pytest.mark.parametrize("format", ["lit-llama", "litgpt", "peft"])
def test_a_tanh_gate_is_written_as_what_it_multiplies(tiny_llama, tmp_path, format):
    gate = "scalar" if format == "peft" else "per_head"
    config, settings, tensors = adapter(tiny_llama, MHA, version="v1", gate_activation="tanh", gate=gate)
    notices = write_foreign(format, tmp_path, settings, tensors, config, base_model="a/base")
    back = read_foreign(tmp_path, config)
    assert any("tanh(gate) was written" in notice for notice in notices)
    assert back.settings.gate_activation == "none"
    for name, tensor in tensors.items():
        assert torch.equal(back.tensors[name], tensor.tanh() if name.endswith("gate") else tensor)


def test_a_linear_gate_below_1_survives_the_originals_tanh_to_fp32_rounding(tiny_llama, tmp_path):
    config, settings, tensors = adapter(tiny_llama, MHA, version="v1")
    gate = tensors["model.layers.2.self_attn.zero_init.gate"]
    gate.copy_(torch.tensor([-0.99999, 0.5, 1e-6, 0.0]))
    write_foreign("llama-adapter", tmp_path, settings, tensors, config, base_model="a/base")
    back = read_foreign(tmp_path, config)
    assert back.settings.gate_activation == "tanh"
    acting = back.tensors["model.layers.2.self_attn.zero_init.gate"].double().tanh()
    # atanh(g) in fp32 is off by 2^-24 of itself; tanh turns that into 2^-24 x atanh(g) x (1 - g^2) < 2^-24
    torch.testing.assert_close(acting, gate.double(), rtol=2.0**-23, atol=2.0**-24)


@pytest.mark.real_data
@pytest.mark.parametrize(
    "name",
    ["lit_v1", "lit_v2", "ogv_v1", "ogv_mm7b_text", "peft_mha", "peft_gqa"],
)
def test_their_own_file_is_written_as_it_was_read(shared: Path, tmp_path, name):
    golden = shared / "golden" / "adapters"
    file = golden / (f"{name}_adapter" if "peft" in name else f"{name}_adapter.safetensors")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2 if name == "peft_gqa" else 4,
    )
    read = read_foreign(file, config)
    write_foreign(read.format, tmp_path, read.settings, read.tensors, config, base_model="")
    theirs = load_file(file / "adapter_model.safetensors" if "peft" in name else file)
    if "peft" in name:
        ours = load_file(tmp_path / "adapter_model.safetensors")
    else:
        (path,) = tmp_path.iterdir()
        document = torch.load(path, weights_only=True)
        ours = document.get("model", document)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if name.startswith("ogv") and key.endswith(("layers.0.attention.gate", "layers.1.attention.gate")):
            assert not ours[key].any()  # gates of layers without a prompt, which nothing reads
        else:
            assert torch.equal(ours[key], tensor), key
