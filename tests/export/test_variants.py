"""Every variant of the adapter is the adapter's formula once it is merged, on every kind of LLaMA."""

import json
from typing import Any

import pytest
import torch
from exported_runs import LAYOUT, LLAMA_3, MASTER_LENGTH, formula, ids, open_export
from oracles.masked_attention import relative_error
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.export import export_merged

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
NO_PROMPTS = {"scale": False, "bias": False, "norm": False}
BIASES = {"attention_bias": True, "mlp_bias": True}
# The variant, and whether the export of a base without biases has them on attention and on the MLP.
VARIANTS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "all of v2": ({}, True, True),
    "scales": ({"bias": False}, False, False),
    "biases": ({"scale": False}, True, True),
    "scales of q and down, a bias of v": (
        {"scale": ("q_proj", "down_proj"), "bias": ("v_proj",)},
        True,
        False,
    ),
    "a bias of down, no head": ({"scale": False, "bias": ("down_proj",), "lm_head": False}, False, True),
    "norms": ({"scale": False, "bias": False}, False, False),
    "no norms": ({"norm": False}, True, True),
    "prompts": (NO_PROMPTS, False, False),
    "the head": (NO_PROMPTS | {"lm_head": True}, False, False),
    "the head's scale": (NO_PROMPTS | {"lm_head": "scale"}, False, False),
    "the head's bias": (NO_PROMPTS | {"lm_head": "bias"}, False, False),
    "no head": ({"lm_head": False}, True, True),
    "a gate per layer": ({"gate": "scalar"}, True, True),
    "tanh": ({"gate_activation": "tanh"}, True, True),
    "tanh, a gate per layer": ({"gate": "scalar", "gate_activation": "tanh"}, True, True),
    "the top layer": ({"top_layers": 1}, True, True),
}
BASES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4, "head_dim": 8},
    "llama 3": {"rope_parameters": LLAMA_3, "num_key_value_heads": 1},
    "llama 3, tied": {"rope_parameters": LLAMA_3, "tie_word_embeddings": True},
    "llama 3, tied, biases": {"rope_parameters": LLAMA_3, "tie_word_embeddings": True} | BIASES,
}


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_merged_variant_is_its_formula_and_has_the_biases_it_needs(trained_run, tmp_path, name):
    variant, attention_bias, mlp_bias = VARIANTS[name]
    run = trained_run("v2", adapter=variant)
    export_merged(run.folder, tmp_path / "out")
    exported = open_export(tmp_path / "out")
    assert relative_error(exported(input_ids=ids()).logits, formula(run, variant)) < 1e-5
    assert (exported.config.attention_bias, exported.config.mlp_bias) == (attention_bias, mlp_bias)


@torch.no_grad()
@pytest.mark.parametrize("variant", [{}, {"gate": "scalar"}, {"gate_activation": "tanh"}], ids=str)
def test_a_merged_v1_is_its_formula(trained_run, tmp_path, variant):
    run = trained_run("v1", adapter=variant)
    export_merged(run.folder, tmp_path / "out")
    found = open_export(tmp_path / "out")(input_ids=ids()).logits
    assert relative_error(found, formula(run, variant)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", [{}, {"bias": False}, {"bias": ("k_proj",), "scale": False}], ids=str)
def test_a_variant_folds_into_every_kind_of_llama(trained_run, tmp_path, base, variant):
    run = trained_run("v2", adapter=variant, **BASES[base])
    export_merged(run.folder, tmp_path / "out")
    found = open_export(tmp_path / "out")(input_ids=ids()).logits
    assert relative_error(found, formula(run, variant)) < 1e-5


@torch.no_grad()
def test_a_sparse_layout_goes_with_a_variant(trained_run, tmp_path):
    variant = {"gate": "scalar", "gate_activation": "tanh", "bias": ("v_proj",), "lm_head": "scale"}
    run = trained_run("v2", layout=LAYOUT, adapter=variant)
    export_merged(run.folder, tmp_path / "out")
    batch = ids(MASTER_LENGTH)
    found = open_export(tmp_path / "out")(input_ids=batch).logits
    assert relative_error(found, run.model(input_ids=batch).logits) < 1e-5


def without_gates(model: LlamaForCausalLM) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("zero_init.gate"):
            parameter.zero_()


def test_scales_alone_fold_into_a_llama_without_biases_and_without_code(trained_run, tmp_path):
    run = trained_run("v2", adapter={"bias": False}, change=without_gates)
    exported = export_merged(run.folder, tmp_path / "out")
    assert not exported.needs_code
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not [name for name in names if name.endswith("bias")]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(model.config) is LlamaConfig
    with torch.no_grad():
        found = model(input_ids=ids()).logits
    assert relative_error(found, formula(run, {})) < 1e-5


def test_a_plain_configuration_has_the_rotary_settings_by_their_older_names_too(trained_run, tmp_path):
    """transformers before 5 knows these only, and in their place takes 10,000 and no scaling."""
    run = trained_run("v2", change=without_gates, adapter={"lm_head": False}, rope_parameters=LLAMA_3)
    export_merged(run.folder, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert LlamaConfig.from_pretrained(tmp_path / "out").rope_parameters == LLAMA_3
    del document["rope_parameters"]
    assert document["rope_theta"] == LLAMA_3["rope_theta"]
    assert document["rope_scaling"] == {key: LLAMA_3[key] for key in LLAMA_3 if key != "rope_theta"}
    assert LlamaConfig.from_dict(document).rope_parameters == LLAMA_3


def test_where_one_projection_has_a_bias_the_others_of_its_kind_get_zeros(trained_run, tmp_path):
    variant = {"bias": ("v_proj",), "scale": False, "lm_head": False}
    run = trained_run("v2", adapter=variant)
    export_merged(run.folder, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("_proj.bias")}
    assert {name.split(".")[-2] for name in biases} == set(ATTENTION)
    assert len(biases) == 4 * len(ATTENTION)
    for name, tensor in biases.items():
        assert bool((tensor != 0).any()) == ("v_proj" in name)


def test_biases_of_zero_switch_nothing_on(trained_run, tmp_path):
    def zero(model):
        for name, parameter in model.named_parameters():
            if name.endswith("adapter_bias") and ".mlp." in name:
                parameter.zero_()

    export_merged(trained_run("v2", change=zero).folder, tmp_path / "out")
    config = open_export(tmp_path / "out").config
    assert (config.attention_bias, config.mlp_bias) == (True, False)


def test_what_no_part_of_the_adapter_reaches_keeps_its_bits(trained_run, tmp_path):
    """Layers below the top ones, and projections without a scale."""
    run = trained_run("v2", adapter={"top_layers": 1, "scale": ("q_proj",)}, dtype="bfloat16")
    base = load_file(run.base / "model.safetensors")
    export_merged(run.folder, tmp_path / "out", dtype=torch.float32)
    found = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, tensor in base.items() if not torch.equal(found[name], tensor)}
    assert changed == {
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.input_layernorm.weight",
        "model.layers.3.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert bool((found["model.layers.0.self_attn.q_proj.bias"] == 0).all())
