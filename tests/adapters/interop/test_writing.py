"""What each format's files are called and hold, and what it cannot hold: refused with the reason, or, where
the values allow it, written after all."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import shake, trainable_state
from safetensors.torch import load_file

from sparse_llama.adapters.attach import attach_adapters
from sparse_llama.adapters.interop import FOREIGN, read_foreign, write_foreign
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import CheckpointError, ExportError

MHA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}
KINDS = ("scale", "bias")
TEXT_BIAS = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Adapter:
    """A trained adapter of the tiny LLaMA: its base's configuration, its settings and its tensors."""

    def __init__(self, make: Any, base: dict[str, Any], **settings: Any) -> None:
        model = make(**base)
        self.config = model.config
        self.settings = AdapterSettings.parse({"prompt_length": 3} | settings)
        attach_adapters(model, self.settings)
        self.tensors = trainable_state(shake(model))

    def write(self, format: str, folder: Path) -> tuple[str, ...]:
        return write_foreign(format, folder, self.settings, self.tensors, self.config, base_model="a/base")

    def gate(self, layer: int = 2) -> torch.Tensor:
        return self.tensors[f"model.layers.{layer}.self_attn.zero_init.gate"]

    def make_idle(self) -> "Adapter":
        """Set every scale to 1 and every bias to 0."""
        for name, tensor in self.tensors.items():
            if name.endswith(("adapter_scale", "adapter_bias")):
                tensor.fill_(float(name.endswith("scale")))
        return self


def pickled(path: Path) -> dict[str, torch.Tensor]:
    document = torch.load(path, weights_only=True)
    return document.get("model", document)


@pytest.mark.parametrize(
    ("format", "settings", "files"),
    [
        ("peft", {"version": "v1", "gate": "scalar"}, ["adapter_config.json", "adapter_model.safetensors"]),
        ("lit-llama", {"version": "v1"}, ["lit-llama-adapter-finetuned.pth"]),
        ("lit-llama", {"version": "v2"}, ["lit-llama-adapter-finetuned.pth"]),
        ("litgpt", {"version": "v1"}, ["lit_model.pth.adapter"]),
        ("litgpt", {"version": "v2"}, ["lit_model.pth.adapter_v2"]),
        ("llama-adapter", {"version": "v1", "gate_activation": "tanh"}, ["adapter.pth"]),
    ],
)
def test_files_are_called_as_their_programs_call_them(tiny_llama, tmp_path, format, settings, files):
    Adapter(tiny_llama, MHA, **settings).write(format, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == files
    assert format in FOREIGN


def test_lit_llamas_v2_file_has_its_names_and_shapes(tiny_llama, tmp_path):
    Adapter(tiny_llama, MHA, version="v2").write("lit-llama", tmp_path)
    found = pickled(tmp_path / "lit-llama-adapter-finetuned.pth")
    layer = {
        "attn.c_attn": 96,
        "attn.c_proj": 32,
        "mlp.c_fc1": 48,
        "mlp.c_fc2": 48,
        "mlp.c_proj": 32,
    }
    expected = {f"{name}.adapter_{kind}": [size] for name, size in layer.items() for kind in KINDS}
    expected |= {"rms_1.scale": [32], "rms_2.scale": [32]}
    prompt = {"attn.adapter_wte.weight": [3, 32], "attn.gating_factor": [1, 4, 1, 1]}
    names = {f"transformer.h.{i}.{name}": shape for i in range(4) for name, shape in expected.items()}
    names |= {f"transformer.h.{i}.{name}": shape for i in (2, 3) for name, shape in prompt.items()}
    names |= {"lm_head.adapter_scale": [64], "lm_head.adapter_bias": [64], "transformer.ln_f.scale": [32]}
    assert {name: list(tensor.shape) for name, tensor in found.items()} == names
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert found["lm_head.adapter_scale"][61:].tolist() == [1, 1, 1]  # the padding does nothing
    assert found["lm_head.adapter_bias"][61:].tolist() == [0, 0, 0]


def test_litgpts_v2_file_has_its_names_shapes_and_row_order(tiny_llama, tmp_path):
    """``litgpt/model.py``: q | k | v, and silu(fc_1) * fc_2."""
    adapter = Adapter(tiny_llama, {}, version="v2")  # 4 query and 2 key/value heads, 10 wide
    adapter.write("litgpt", tmp_path)
    found = pickled(tmp_path / "lit_model.pth.adapter_v2")
    sources = {
        "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attn.proj": ["self_attn.o_proj"],
        "mlp.fc_1": ["mlp.gate_proj"],
        "mlp.fc_2": ["mlp.up_proj"],
        "mlp.proj": ["mlp.down_proj"],
    }
    for name, ours in sources.items():
        for kind in KINDS:
            parts = [adapter.tensors[f"model.layers.1.{part}.adapter_{kind}"] for part in ours]
            assert torch.equal(found[f"transformer.h.1.{name}.adapter_{kind}"], torch.cat(parts)), name
    gate = found["transformer.h.3.attn.gating_factor"]
    assert gate.shape == (1, 1, 4, 1)
    assert torch.equal(gate.flatten(), adapter.gate(3))
    norm = adapter.tensors["model.layers.0.post_attention_layernorm.weight"]
    assert torch.equal(found["transformer.h.0.norm_2.weight"], norm)
    assert torch.equal(found["transformer.ln_f.weight"], adapter.tensors["model.norm.weight"])


@pytest.mark.parametrize(("vocabulary", "padded"), [(61, 64), (64, 64), (32000, 32000), (32016, 32016)])
def test_litgpts_head_has_its_padded_vocabulary(tiny_llama, tmp_path, vocabulary, padded):
    """32016 is Code Llama's, which litgpt/config.py pads to a multiple of 16, others to one of 64."""
    notices = Adapter(tiny_llama, {"vocab_size": vocabulary}, version="v2").write("litgpt", tmp_path)
    assert pickled(tmp_path / "lit_model.pth.adapter_v2")["lm_head.adapter_scale"].shape == (padded,)
    assert any("padded_vocab_size" in notice for notice in notices) == (vocabulary != padded)


def test_a_file_holds_no_more_than_its_tensors(tiny_llama, tmp_path):
    """torch.save writes the whole storage of a view."""
    adapter = Adapter(tiny_llama, MHA, version="v1")
    large = torch.zeros(1000, 3, 32)
    for name in adapter.tensors:
        if name.endswith("prompt"):
            adapter.tensors[name] = large[17]
    adapter.write("lit-llama", tmp_path)
    assert (tmp_path / "lit-llama-adapter-finetuned.pth").stat().st_size < 10_000


def test_pefts_configuration_says_what_peft_needs(tiny_llama, tmp_path):
    Adapter(tiny_llama, MHA, version="v1", gate="scalar", top_layers=3).write("peft", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("ADAPTION_PROMPT", "CAUSAL_LM")
    assert (config["adapter_layers"], config["adapter_len"]) == (3, 3)
    assert config["base_model_name_or_path"] == "a/base"
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 6


@pytest.mark.parametrize(
    ("format", "base", "settings", "reason"),
    [
        ("peft", MHA, {"version": "v1"}, 'one gate per layer; train with .*adapter.gate "scalar"'),
        ("peft", MHA, {"version": "v2", "gate": "scalar"}, 'v1 only; train with .*adapter.version "v1"'),
        ("peft", {"attention_bias": True} | MHA, {"version": "v1", "gate": "scalar"}, "PEFT adds twice"),
        ("peft", {}, {"version": "v1", "gate": "scalar"}, "num_attention_heads = 8 wide, this base's are 10"),
        ("lit-llama", {"head_dim": 8}, {"version": "v1"}, "has 2 and 4; use --format litgpt or native"),
        ("lit-llama", MHA | {"head_dim": 10}, {"version": "v1"}, "= 8 wide, this base's are 10"),
        ("lit-llama", MHA | {"mlp_bias": True}, {"version": "v2"}, "no biases of the base's"),
        ("llama-adapter", {"head_dim": 8}, {"version": "v1"}, "has 2 and 4; use --format litgpt or native"),
        ("llama-adapter", MHA | {"attention_bias": True}, {"version": "v1"}, "no biases of the base's"),
        ("llama-adapter", MHA, {"version": "v2", "gate_activation": "tanh"}, "adapter_scale, and its code"),
        (
            "llama-adapter",
            MHA,
            {"version": "v2", "gate_activation": "tanh", "scale": False, "lm_head": False},
            "k_proj.adapter_bias, and its code has norms and biases on q, o, gate, up and down",
        ),
        (
            "llama-adapter",
            MHA,
            {"version": "v2", "gate_activation": "tanh", "scale": False, "bias": TEXT_BIAS},
            "lm_head.adapter_bias, and its code",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tiny_llama, tmp_path, format, base, settings, reason):
    adapter = Adapter(tiny_llama, base, **settings)
    with pytest.raises(ExportError, match=reason) as caught:
        adapter.write(format, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--format {format}: ")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("largest", [1.0, -1.5, float("nan")])
def test_a_gate_that_tanh_does_not_reach_is_refused(tiny_llama, tmp_path, largest):
    adapter = Adapter(tiny_llama, MHA, version="v1")
    for layer in (2, 3):
        adapter.gate(layer).copy_(torch.tensor([0.1, -0.9999, 0.5, 0]))
    adapter.write("llama-adapter", tmp_path)
    adapter.gate(3)[1] = largest
    with pytest.raises(ExportError, match=r"a gate of layer 3 is .* always below 1; train with"):
        adapter.write("llama-adapter", tmp_path)


def test_heads_that_share_one_gate_fit_pefts(tiny_llama, tmp_path):
    adapter = Adapter(tiny_llama, MHA, version="v1")
    for layer in (2, 3):
        adapter.gate(layer).fill_(0.1 * layer)
    adapter.write("peft", tmp_path)
    back = read_foreign(tmp_path, adapter.config)
    assert back.tensors["model.layers.3.self_attn.zero_init.gate"].tolist() == [adapter.gate(3)[0].item()]


def test_scales_and_biases_that_do_nothing_are_no_hindrance(tiny_llama, tmp_path):
    adapter = Adapter(tiny_llama, MHA, version="v2", norm=False, gate="scalar").make_idle()
    adapter.write("peft", tmp_path / "peft")
    assert read_foreign(tmp_path / "peft", adapter.config).settings.version == "v1"
    norms = Adapter(tiny_llama, MHA, version="v2", gate_activation="tanh").make_idle()
    norms.write("llama-adapter", tmp_path / "original")
    back = read_foreign(tmp_path / "original", norms.config)
    assert back.settings.trains_norms
    weight = "model.layers.1.input_layernorm.weight"
    assert torch.equal(back.tensors[weight], norms.tensors[weight])


@pytest.mark.parametrize("format", ["lit-llama", "litgpt"])
def test_norms_that_do_not_train_are_left_to_the_base(tiny_llama, tmp_path, format):
    Adapter(tiny_llama, MHA, version="v2", norm=False).write(format, tmp_path)
    (path,) = tmp_path.iterdir()
    assert not [name for name in pickled(path) if "rms" in name or "norm" in name or "ln_f" in name]


def test_litgpt_gets_every_scale_and_bias_because_it_loads_strictly(tiny_llama, tmp_path):
    Adapter(tiny_llama, {}, version="v2", top_layers=1, scale=["v_proj"], bias=False).write(
        "litgpt", tmp_path
    )
    found = pickled(tmp_path / "lit_model.pth.adapter_v2")
    modules = ("attn.qkv", "attn.proj", "mlp.fc_1", "mlp.fc_2", "mlp.proj")
    whole = {
        f"transformer.h.{i}.{name}.adapter_{kind}" for i in range(4) for name in modules for kind in KINDS
    }
    assert whole <= found.keys()
    assert bool((found["transformer.h.3.attn.qkv.adapter_scale"][:60] == 1).all())
    assert not bool((found["transformer.h.3.attn.qkv.adapter_scale"][60:] == 1).any())


@pytest.mark.parametrize(
    ("format", "base", "settings", "told"),
    [
        ("litgpt", {}, {"version": "v1"}, "litgpt itself computes another function"),
        ("litgpt", {}, {"version": "v1", "gate": "scalar"}, "litgpt has a gate per head"),
        ("litgpt", {}, {"version": "v1"}, "made with adapter_prompt_length = 3"),
        ("lit-llama", MHA, {"version": "v1", "start_layer": 1}, "made with adapter_start_layer = 1"),
        ("lit-llama", MHA, {"version": "v1"}, "intermediate_size 256 .this base: 48., rms_norm_eps 1e-05"),
        (
            "lit-llama",
            MHA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
            {"version": "v1"},
            "rope_type default .this base: linear., rope_theta 10000.0 .this base: 500000.0.",
        ),
        (
            "llama-adapter",
            MHA,
            {"version": "v1", "gate_activation": "tanh"},
            "adapter_layer 2 and adapter_len 3",
        ),
        ("llama-adapter", MHA, {"version": "v1", "gate_activation": "tanh"}, "rounds tanh.gate. to fp16"),
        (
            "llama-adapter",
            MHA,
            {"version": "v2", "gate_activation": "tanh", "scale": False, "bias": TEXT_BIAS, "lm_head": False},
            "query_layer 2 and query_len 3|adds an image's features",
        ),
    ],
)
def test_what_the_program_needs_or_does_otherwise_is_told(tiny_llama, tmp_path, format, base, settings, told):
    notices = Adapter(tiny_llama, base, **settings).write(format, tmp_path)
    assert any(re.search(told, notice) for notice in notices), notices


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_litgpt_is_blamed_only_where_it_has_several_groups(tiny_llama, tmp_path, num_kv_heads):
    adapter = Adapter(tiny_llama, {"num_key_value_heads": num_kv_heads}, version="v1", prompt_length=10)
    written = adapter.write("litgpt", tmp_path)
    read = read_foreign(tmp_path, adapter.config).notices
    assert len(written) == len(read) == num_kv_heads - 1


def test_lit_llamas_own_base_needs_no_word(tiny_llama, tmp_path):
    base = MHA | {"intermediate_size": 256, "rms_norm_eps": 1e-5}
    assert Adapter(tiny_llama, base, version="v2", prompt_length=10).write("lit-llama", tmp_path) == ()


def test_tensors_of_other_settings_are_refused(tiny_llama, tmp_path):
    adapter = Adapter(tiny_llama, MHA, version="v1")
    del adapter.tensors["model.layers.2.self_attn.zero_init.gate"]
    with pytest.raises(CheckpointError, match=r"the adapter: has no model.layers.2.self_attn.zero_init.gate"):
        adapter.write("lit-llama", tmp_path)
