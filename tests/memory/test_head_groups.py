"""A layer of head groups computes what the plain adapted layer computes: outputs, loss and every gradient.

The reference is plain autograd over the same model in fp64. transformers' RMSNorm rounds fp64 to fp32, which
would hide an error of 1e-7, so that both have one in their own type here.
"""

from typing import Any

import pytest
import torch
from adapted_models import adapt, tokens, trainable_state
from grouped_models import (
    assert_equal_gradients,
    gradients,
    grouped_model,
    plain_model,
    relative_errors,
    with_wide_norms,
)
from oracles.adapter_formula import adapted_logits, token_loss
from transformers import LlamaConfig

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.adapters.bank import set_adapter
from sparse_llama.config.settings import MemorySettings
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import ConfigError
from sparse_llama.memory.head_groups import HeadGroupLayer, group_heads
from sparse_llama.memory.head_groups_call import make_groups
from sparse_llama.memory.tiles import tile_layers

EXACT = 1e-10  # fp64; found: 3e-14
SQUARE = {"num_key_value_heads": 4, "head_dim": 8}  # heads as wide as the model, as in LLaMA-7B
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
SPARSE = {
    "bigbird": {"mode": "bigbird", "block": 2, "different_layout_per_head": True, "num_random_blocks": 1},
    "s2": {"mode": "s2", "block": 2, "group_blocks": 2},
    "fixed": {"mode": "fixed", "block": 2, "num_local_blocks": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "one gate per layer, tanh": {"version": "v1", "gate": "scalar", "gate_activation": "tanh"},
    "gates per head, tanh": {"version": "v2", "gate_activation": "tanh"},
    "scales alone": {"version": "v2", "bias": False},
    "biases alone": {"version": "v2", "scale": False, "norm": False},
    "norms alone": {"version": "v2", "scale": False, "bias": False},
    "some projections": {"version": "v2", "scale": ("v_proj", "down_proj"), "bias": ("gate_proj", "o_proj")},
    "no norms": {"version": "v2", "norm": False},
    "the last two layers": {"version": "v2", "start_layer": None, "top_layers": 2},
    "prompts in every layer": {"version": "v1", "start_layer": 0},
    "a base with biases": {"version": "v2", "sizes": {"attention_bias": True, "mlp_bias": True}},
    "another activation": {"version": "v2", "sizes": {"hidden_act": "gelu"}},
    "one key/value head": {"version": "v2", "sizes": {"num_key_value_heads": 1}},
    "heads as wide as the model": {"version": "v2", "sizes": SQUARE},
}


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tile", [1, 4, 100])
def test_loss_and_every_gradient_are_plain_autograds(tiny_llama, version, groups, tile):
    """Memory trap 12: 9 tokens in tiles of 1, 4 and 100; 4 query heads over 2 key/value heads, a group being
    all of them, a key/value head's, or a half of that."""
    expected = gradients(plain_model(tiny_llama, version), tokens())
    found = gradients(grouped_model(tiny_llama, version, groups, tile=tile), tokens())
    assert_equal_gradients(found, expected, EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_adapters_is_differentiated(tiny_llama, variant):
    expected = gradients(plain_model(tiny_llama, **VARIANTS[variant]), tokens())
    found = gradients(grouped_model(tiny_llama, groups=2, **VARIANTS[variant]), tokens())
    assert_equal_gradients(found, expected, EXACT)


@pytest.mark.parametrize("mode", [None, *SPARSE])
@pytest.mark.parametrize("position_ids", [None, PACKED], ids=["one document", "packed"])
def test_a_group_has_the_layouts_of_its_heads_and_documents_stay_apart(tiny_llama, mode, position_ids):
    """A group's first head is not the layer's: bigbird draws, and S2 shifts, by the layer's numbers."""
    layout = None if mode is None else parse_sparsity(SPARSE[mode])
    expected = gradients(plain_model(tiny_llama, "v2", sparsity=layout), tokens(), position_ids)
    for groups in (2, 4):
        model = grouped_model(tiny_llama, "v2", groups, sparsity=layout)
        assert_equal_gradients(gradients(model, tokens(), position_ids), expected, EXACT)
    if mode is not None:
        dense = gradients(plain_model(tiny_llama, "v2"), tokens(), position_ids)
        assert abs(float(dense[0] - expected[0])) > 1e-3, "a layout that leaves out nothing proves nothing"


@pytest.mark.parametrize(("num_rows", "num_tokens"), [(1, 1), (3, 1), (1, 8), (2, 5)])
def test_any_number_of_rows_and_tokens_will_do(tiny_llama, num_rows, num_tokens):
    ids = tokens(num_rows, num_tokens)
    models = plain_model(tiny_llama, "v2"), grouped_model(tiny_llama, "v2", 2)
    (expected_loss, expected), (loss, found) = (gradients(model, ids) for model in models)
    torch.testing.assert_close(loss, expected_loss, rtol=EXACT, atol=0)
    for name, tensor in expected.items():  # a single token's query and key have no gradient but rounding
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_gradients_are_those_of_the_papers_formula(tiny_llama, version):
    """Against the formula in plain tensors, whose angles are fp64 where transformers' are fp32: a rounding of
    6e-8 in positions up to 9."""
    model = grouped_model(tiny_llama, version, 2)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    leaves = {name: weights[name].requires_grad_() for name, _ in trainable_parameters(model)}
    config: LlamaConfig = model.config
    expected = token_loss(adapted_logits(weights, config, tokens()), tokens())
    expected.backward()
    logits = model(input_ids=tokens(), use_cache=False).logits
    found = token_loss(logits, tokens())
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    own = {name: parameter.grad for name, parameter in trainable_parameters(model)}
    errors = relative_errors(own, {name: leaf.grad for name, leaf in leaves.items()})  # type: ignore[arg-type]
    assert max(errors.values()) < 1e-5


def test_a_scale_of_zero_has_its_gradient(tiny_llama):
    """Memory trap 5: y / scale would not know what was scaled."""
    models = plain_model(tiny_llama, "v2"), grouped_model(tiny_llama, "v2", 2)
    for model in models:
        for name, parameter in trainable_parameters(model):
            if name.endswith("adapter_scale"):
                parameter.data[::3] = 0
    expected, found = (gradients(model, tokens()) for model in models)
    assert all(bool(one.isfinite().all()) for one in found[1].values())
    assert_equal_gradients(found, expected, EXACT)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("groups", [1, 4])
def test_16_bits_are_no_less_exact_than_plain_autograds(tiny_llama, version, groups):
    """Memory trap 20: the input's gradient adds up over groups in bf16. Errors against fp64 over all
    gradients, from the same bf16 weights."""
    ids, sizes = tokens(2, 40), {"num_hidden_layers": 2, "initializer_range": 0.1}

    def make() -> Any:
        return adapt(tiny_llama(**sizes), version, start_layer=0, noise=0.1).bfloat16()

    exact = gradients(with_wide_norms(make().double()).train(), ids)[1]
    ordinary = gradients(make().train(), ids)[1]
    model = make().train()
    group_heads(model, MemorySettings(head_groups=groups, mlp_tile=7))
    grouped = gradients(model, ids)[1]
    theirs, ours = (sum(relative_errors(one, exact).values()) / len(exact) for one in (ordinary, grouped))
    assert ours <= 1.1 * theirs, (ours, theirs)


def test_a_run_in_fp32_differs_by_rounding_alone(tiny_llama):
    """As trained: transformers' norms and all. 2^-24 per operation, through four layers."""
    plain = adapt(tiny_llama(), "v2").train()
    grouped = adapt(tiny_llama(), "v2").train()
    tile_layers(grouped, MemorySettings(mlp_tile=4, norm_tile=4))
    group_heads(grouped, MemorySettings(mlp_tile=4, head_groups=2))
    assert_equal_gradients(gradients(grouped, tokens()), gradients(plain, tokens()), 3e-5)


def test_a_second_backward_pass_through_the_same_graph_is_the_first(tiny_llama):
    """Memory trap 13: nothing that a graph keeps is written to."""
    model = grouped_model(tiny_llama, "v2", 2)
    loss = model(input_ids=tokens(), use_cache=False).logits.log_softmax(-1)[..., 0].sum()
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_gradient_of_the_gradient_is_refused(tiny_llama):
    model: Any = grouped_model(tiny_llama, "v1", 2)
    loss = model(input_ids=tokens(), use_cache=False).logits.square().sum()
    gate = model.model.layers[2].self_attn.zero_init.gate
    (grad,) = torch.autograd.grad(loss, gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_names_and_values_in_a_state_dict_do_not_change(tiny_llama):
    plain, grouped = adapt(tiny_llama(), "v2"), adapt(tiny_llama(), "v2")
    group_heads(grouped, MemorySettings(head_groups=2))
    expected, found = plain.state_dict(), grouped.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert list(trainable_state(grouped)) == list(trainable_state(plain))


def test_evaluation_differs_by_rounding_and_generation_not_at_all(tiny_llama):
    """A validation row is as long as a training row, so its forward pass is in groups too; with a cache the
    computation is transformers' own."""
    plain: Any = adapt(tiny_llama(), "v2")
    grouped: Any = adapt(tiny_llama(), "v2")
    group_heads(grouped, MemorySettings(head_groups=2, mlp_tile=4))
    with torch.no_grad():
        expected, found = (model(input_ids=tokens(), use_cache=False).logits for model in (plain, grouped))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        cached = [model(input_ids=tokens(), use_cache=True).logits for model in (plain, grouped)]
    assert torch.equal(*cached)
    texts = [
        model.generate(tokens(1), max_new_tokens=6, do_sample=False, pad_token_id=0)
        for model in (plain, grouped)
    ]
    assert torch.equal(*texts)


def test_a_mixture_of_adapters_computes_as_without_groups(tiny_llama):
    """Mixtures are for inference: several prompts side by side, of which the groups know nothing. Layers
    without a prompt stay in groups."""
    models = [adapt(tiny_llama(), "v2") for _ in range(2)]
    group_heads(models[1], MemorySettings(head_groups=2))
    for model in models:
        set_adapter(model, {"default": 0.5})
    with torch.no_grad():
        plain, grouped = (model.eval()(input_ids=tokens(), use_cache=False).logits for model in models)
    torch.testing.assert_close(grouped, plain, rtol=1e-4, atol=1e-4)


def test_the_layer_stays_one_of_transformers(tiny_llama):
    """Its hidden states can be asked for, and whoever looks for decoder layers finds them."""
    model = grouped_model(tiny_llama, "v1", 2)
    assert all(isinstance(layer, HeadGroupLayer) for layer in model.model.layers)
    states = model(input_ids=tokens(), use_cache=False, output_hidden_states=True).hidden_states
    assert len(states) == len(model.model.layers) + 1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "groups", "allowed"),
    [(32, 32, 3, "1, 2, 4, 8, 16, 32"), (12, 4, 6, "1, 2, 4, 12"), (32, 8, 64, "1, 2, 4, 8, 16, 32")],
)
def test_groups_that_do_not_come_out_even_are_refused_with_those_that_do(heads, kv_heads, groups, allowed):
    config = LlamaConfig(hidden_size=384, num_attention_heads=heads, num_key_value_heads=kv_heads)
    with pytest.raises(
        ConfigError,
        match=rf"sparse_llama\.memory\.head_groups: {groups} .* {kv_heads} .*use one of {allowed}$",
    ):
        make_groups(config, groups)


def test_groups_are_of_query_heads_that_share_their_key_value_heads():
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=4)
    by_number = {number: make_groups(config, number) for number in (2, 8)}
    assert [(list(one.heads), list(one.kv_heads)) for one in by_number[2]] == [
        ([0, 1, 2, 3], [0, 1]),
        ([4, 5, 6, 7], [2, 3]),
    ]
    assert [list(one.kv_heads) for one in by_number[8]] == [[0], [0], [1], [1], [2], [2], [3], [3]]


def test_a_trained_weight_of_the_base_is_refused(tiny_llama):
    """Its gradient would be missing, without an error."""
    model: Any = grouped_model(tiny_llama, "v1", 2)
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="parameter of the base trains"):
        model(input_ids=tokens(), use_cache=False)
