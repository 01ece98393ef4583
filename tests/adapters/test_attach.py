"""What trains, under which names, how much of it, and from which initial values."""

from typing import Any

import pytest
import torch
from adapted_models import adapt, trainable_state
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.adapters.attach import (
    attach_adapters,
    first_trained_layer,
    parameter_groups,
    trainable_parameters,
)
from sparse_llama.adapters.bank import disable_adapters
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import ConfigError

LINEARS = [f"self_attn.{letter}_proj" for letter in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]


def names(model) -> set[str]:
    return {name for name, _ in trainable_parameters(model)}


def v1_names() -> set[str]:
    return {f"model.layers.{i}.self_attn.zero_init.{kind}" for i in (2, 3) for kind in ("prompt", "gate")}


def v2_names() -> set[str]:
    linears = {f"model.layers.{i}.{linear}" for i in range(4) for linear in LINEARS} | {"lm_head"}
    scales = {f"{linear}.adapter_{kind}" for linear in linears for kind in ("scale", "bias")}
    norms = {
        f"model.layers.{i}.{name}_layernorm.weight" for i in range(4) for name in ("input", "post_attention")
    }
    return v1_names() | scales | norms | {"model.norm.weight"}


@pytest.mark.parametrize(
    "base", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}]
)
def test_exactly_the_adapters_train_and_nothing_whose_name_resembles_theirs(tiny_llama, base):
    """T24, T27: a base with biases of its own keeps them frozen."""
    assert names(adapt(tiny_llama(**base), "v1")) == v1_names()
    assert names(adapt(tiny_llama(**base), "v2")) == v2_names()


ORIGINAL_V2: dict[str, Any] = {
    "scale": False,
    "bias": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lm_head": False,
    "start_layer": 1,
    "gate_activation": "tanh",
}


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"version": "v1"}, 1_229_760),  # lit-llama
        ({"version": "v2"}, 4_279_744),  # lit-llama
        ({"version": "v2", "lm_head": "scale"}, 4_247_744),  # all that folds into plain weights, and prompts
        ({"version": "v1", "top_layers": 30, "gate": "scalar"}, 1_228_830),  # PEFT's adaption_prompt
        # LLaMA-Adapter's multimodal7b: biases 1,097,728, norms 266,240, 31 prompts and gates
        ({"version": "v2"} | ORIGINAL_V2, 1_097_728 + 266_240 + 31 * (40_960 + 32)),
        ({"version": "v2", "scale": False, "bias": False, "norm": False}, 1_229_760),
        # everything of the last two layers, the last norm and the head
        ({"version": "v2", "top_layers": 2}, 2 * (40_960 + 32 + 2 * 42_496 + 8_192) + 4_096 + 64_000),
    ],
)
def test_llama_7b_trains_as_many_parameters_as_the_reference(settings, count):
    """lit-llama, PEFT and the original count what they train."""
    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        attach_adapters(model, AdapterSettings.parse({"prompt_length": 10} | settings))
    assert sum(parameter.numel() for _, parameter in trainable_parameters(model)) == count
    with disable_adapters(model):
        assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({"scale": False}, {"prompt", "gate", "adapter_bias", "weight"}),
        ({"bias": False, "norm": False}, {"prompt", "gate", "adapter_scale"}),
        ({"scale": False, "bias": False}, {"prompt", "gate", "weight"}),
        (
            {"scale": ["v_proj"], "bias": False, "lm_head": False},
            {"prompt", "gate", "adapter_scale", "weight"},
        ),
    ],
)
def test_the_parts_of_v2_can_be_left_out(tiny_llama, settings, ends):
    model = tiny_llama()
    attach_adapters(model, AdapterSettings.parse(settings))
    assert {name.rpartition(".")[2] for name in names(model)} == ends
    if settings.get("scale") == ["v_proj"]:
        scaled = {name for name in names(model) if name.endswith("adapter_scale")}
        assert scaled == {f"model.layers.{i}.self_attn.v_proj.adapter_scale" for i in range(4)}


def test_nothing_below_the_top_layers_is_adapted(tiny_llama):
    for version in ("v1", "v2"):
        model = tiny_llama()
        attach_adapters(model, AdapterSettings(version=version, top_layers=1))  # type: ignore[arg-type]
        of_layers = {name for name in names(model) if name.startswith("model.layers.")}
        assert of_layers == {
            name for name in v1_names() | v2_names() if name.startswith("model.layers.3.")
        } & (v1_names() if version == "v1" else v2_names())
        assert first_trained_layer(model) == 3


def test_more_layers_than_there_are_are_refused(tiny_llama):
    with pytest.raises(ConfigError, match="top_layers: 5 of a model with 4 layers; use at most 4"):
        attach_adapters(tiny_llama(), AdapterSettings(top_layers=5))


def test_the_bases_names_in_a_state_dict_do_not_change(tiny_llama):
    base = tiny_llama(attention_bias=True)
    before = dict(base.state_dict())
    after = adapt(base, "v2").state_dict()
    assert before.keys() <= after.keys()
    assert all("adapter_" in name or "zero_init" in name for name in after.keys() - before.keys())


def test_a_tied_embedding_is_not_scaled_with_the_head(tiny_llama):
    model = adapt(tiny_llama(tie_word_embeddings=True), "v2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.requires_grad
    assert model.lm_head.adapter_scale.requires_grad


def test_the_embeddings_output_needs_no_gradient(tiny_llama):
    """Memory trap 1: or the backward pass runs through the layers below the first adapter."""
    model = adapt(tiny_llama(), "v1")
    assert not model.get_input_embeddings()(torch.tensor([[1, 2]])).requires_grad


def test_prompts_are_standard_normal_and_everything_else_is_the_identity(tiny_llama):
    base = tiny_llama()
    norms = {name: tensor.clone() for name, tensor in base.state_dict().items() if "norm" in name}
    state = trainable_state(adapt(base, "v2", prompt_length=50, is_trained=False))
    for name, tensor in state.items():
        if name.endswith("prompt"):
            assert abs(tensor.std() - 1) < 0.1
            assert abs(tensor.mean()) < 0.1
        elif name.endswith(("gate", "adapter_bias")):
            assert not tensor.any()
        elif name.endswith("adapter_scale"):
            assert (tensor == 1).all()
        else:
            assert torch.equal(tensor, norms[name])


def test_prompts_depend_on_the_seed_and_the_layer_and_on_nothing_else(tiny_llama):
    def prompts(
        seed: int, start_layer: int = 2, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        model = tiny_llama().to(dtype)
        torch.manual_seed(start_layer)  # the global generator has no say
        settings = AdapterSettings(version="v1", prompt_length=3, start_layer=start_layer)
        attach_adapters(model, settings, seed=seed, dtype=dtype)
        return {name: tensor for name, tensor in trainable_state(model).items() if name.endswith("prompt")}

    first, third = (f"model.layers.{layer}.self_attn.zero_init.prompt" for layer in (2, 3))
    drawn = prompts(1)
    assert torch.equal(drawn[third], prompts(1, start_layer=3)[third])
    assert not torch.equal(drawn[first], drawn[third])
    assert not torch.equal(drawn[first], prompts(2)[first])
    assert torch.equal(drawn[first].bfloat16().float(), prompts(1, dtype=torch.bfloat16)[first])


def test_no_layer_left_to_adapt_is_refused(tiny_llama):
    with pytest.raises(
        ConfigError, match=r"start_layer: 4 leaves no layer to adapt, the model has 4 \(0 to 3\)"
    ):
        adapt(tiny_llama(), "v1", start_layer=4)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_weight_decay_reaches_prompts_only(tiny_llama, version):
    """T7, T24: every trainable parameter is in one group, nothing frozen is, and only prompts decay."""
    model = adapt(tiny_llama(), version)
    groups = parameter_groups(model, weight_decay=0.02)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [name_of[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names(model))
    decayed = {name_of[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed == {name for name in names(model) if name.endswith("prompt")}
    assert {group["weight_decay"] for group in groups} == {0.02, 0.0}


def test_the_first_trained_layer_is_the_first_prompt_in_v1_and_layer_0_in_v2(tiny_llama):
    assert first_trained_layer(adapt(tiny_llama(), "v1", start_layer=3)) == 3
    assert first_trained_layer(adapt(tiny_llama(), "v2", start_layer=3)) == 0
    assert first_trained_layer(tiny_llama().requires_grad_(False)) == 4
