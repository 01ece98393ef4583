"""LLaMA-Adapter v1: the formula, its gradients, and that it starts as the base."""

import copy

import pytest
import torch
from adapted_models import adapt, shake, tokens
from oracles.adapter_formula import adapted_logits, token_loss
from transformers import DynamicCache

from sparse_llama.adapters.attach import attach_adapters, trainable_parameters
from sparse_llama.adapters.zero_init import _PromptedAttention
from sparse_llama.attention.interface import attention_core
from sparse_llama.config.settings import AdapterSettings

# L2 error over L2 norm, fp32 against fp64: roundings of 2^-24 through 4 layers, whose softmaxes have scores
# of up to 30
ROUNDING = 3e-5
BASES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
}


def relative_error(actual, expected) -> float:
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


def double(model):
    return {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("base", BASES)
def test_logits_and_gradients_are_the_formulas(tiny_llama, version, base):
    """T16, T19, T20, T22: gates are away from 0, bases have biases, and head_dim is not C / H."""
    model = adapt(tiny_llama(**BASES[base]), version)
    ids = tokens()
    weights = double(model)
    logits, expected = model(input_ids=ids).logits, adapted_logits(weights, model.config, ids)
    assert relative_error(logits, expected) < ROUNDING

    token_loss(logits, ids).backward()
    token_loss(expected, ids).backward()
    for name, parameter in trainable_parameters(model):
        expected_grad = weights[name].grad
        assert expected_grad.norm() > 1e-3, f"{name}: this test would not notice a wrong gradient"
        assert relative_error(parameter.grad, expected_grad) < ROUNDING, name


VARIANTS = {
    "one gate": {"version": "v1", "gate": "scalar"},
    "tanh": {"version": "v1", "gate_activation": "tanh", "start_layer": 0},
    "one gate, tanh": {"gate": "scalar", "gate_activation": "tanh", "scale": False, "top_layers": 2},
    "biases and norms": {"scale": False, "bias": ["q_proj", "o_proj", "up_proj"], "lm_head": False},
    "scales": {"bias": False, "norm": False, "prompt_length": 1},
    "a head's bias": {"scale": ["k_proj", "down_proj"], "bias": False, "lm_head": "bias"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", ["gqa", "biases"])
def test_the_variants_are_the_formula_too(tiny_llama, variant, base):
    """Gates are activated and spread over the heads outside of the formula; what is left out does nothing."""
    model = tiny_llama(**BASES[base])
    settings = AdapterSettings.parse({"prompt_length": 3} | VARIANTS[variant])
    attach_adapters(model, settings)
    shake(model)
    weights = double(model)
    given = dict(weights)
    for name in weights:
        linear, _, kind = name.rpartition(".")
        if kind == "gate":
            gate = weights[name].tanh() if settings.gate_activation == "tanh" else weights[name]
            assert gate.numel() == (1 if settings.gate == "scalar" else 4)
            given[name] = gate.expand(4)
        elif kind == "adapter_scale" and f"{linear}.adapter_bias" not in weights:
            given[f"{linear}.adapter_bias"] = torch.zeros_like(weights[name])
        elif kind == "adapter_bias" and f"{linear}.adapter_scale" not in weights:
            given[f"{linear}.adapter_scale"] = torch.ones_like(weights[name])
    ids = tokens()
    logits, expected = model(input_ids=ids).logits, adapted_logits(given, model.config, ids)
    assert relative_error(logits, expected) < ROUNDING
    token_loss(logits, ids).backward()
    token_loss(expected, ids).backward()
    for name, parameter in trainable_parameters(model):
        assert weights[name].grad.norm() > 1e-3, f"{name}: this test would not notice a wrong gradient"
        assert relative_error(parameter.grad, weights[name].grad) < ROUNDING, name


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("base", BASES)
def test_an_untrained_adapter_changes_no_bit_of_the_logits(tiny_llama, version, base):
    """T2, T19: gate 0, scale 1, bias 0; a base with an o_proj bias adds it once."""
    model = tiny_llama(**BASES[base])
    plain = adapt(copy.deepcopy(model), "v1", is_trained=False)
    for attention in (layer.self_attn for layer in plain.model.layers):
        if hasattr(attention, "zero_init"):
            del attention.zero_init
    adapted = adapt(model, version, is_trained=False)
    assert torch.equal(adapted(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)


def test_the_output_is_linear_in_the_gate(tiny_llama):
    """T16, T17: one joint softmax or a tanh around the gate would bend it."""
    attention = adapt(tiny_llama(), "v1").double().model.layers[3].self_attn
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 6, 10, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 6, 10, generator=generator, dtype=torch.float64)
    prompted = attention.zero_init

    def output(factor: float) -> torch.Tensor:
        prompted.gate.data = factor * torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
        return prompted(query, key, value, attention=attention, position_ids=None, scaling=0.3)

    torch.testing.assert_close(output(2.0) - output(0.0), 2 * (output(1.0) - output(0.0)))
    assert (output(1.0) - output(0.0)).abs().max() > 0.1


def test_every_gradient_of_the_joint_node_is_right_in_fp64(tiny_llama):
    """All six inputs, checked by finite differences; 4 query heads share 2 key/value heads."""
    attention = tiny_llama().double().model.layers[0].self_attn
    adapt_plan = adapt(tiny_llama(), "v1").model.layers[0].self_attn.attention_plan
    attention.attention_plan = adapt_plan
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    query, key, value = draw(2, 4, 5, 10), draw(2, 2, 5, 10), draw(2, 2, 5, 10)
    prompt_key, prompt_value, gate = draw(2, 3, 10), draw(2, 3, 10), draw(4)
    core = attention_core(attention, query, key, None, 0.3)
    assert torch.autograd.gradcheck(
        lambda *inputs: _PromptedAttention.apply(core, *inputs, 0.3),
        (query, key, value, prompt_key, prompt_value, gate),
        atol=1e-6,
    )


def test_the_node_keeps_the_sum_and_no_second_output(tiny_llama):
    """What is saved per token: q, k, v, the sum (2 bytes x C each at 7B) and one lse per head."""
    attention = adapt(tiny_llama(), "v1").model.layers[3].self_attn
    query = torch.randn(1, 4, 16, 10, requires_grad=True)
    key, value = torch.randn(2, 1, 2, 16, 10)
    core = attention_core(attention, query, key, None, 0.3)
    prompt_key, prompt_value = attention.zero_init.prompt_keys_values(attention)
    saved: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _PromptedAttention.apply(
            core, query, key, value, prompt_key, prompt_value, attention.zero_init.gate, 0.3
        )
    per_token = sorted(shape for shape in saved if 16 in shape)
    assert per_token == sorted([(1, 4, 16, 10), (1, 2, 16, 10), (1, 2, 16, 10), (1, 4, 16, 10), (1, 4, 16)])


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_prompts_still_learn_after_an_evaluation_and_a_first_step(tiny_llama, version):
    """T18: a cached K_p, V_p would cut the second step's prompts off and keep the old values in the forward
    pass."""
    model = adapt(tiny_llama(), version)
    optimizer = torch.optim.SGD([parameter for _, parameter in trainable_parameters(model)], lr=1e-3)
    ids = tokens()
    with torch.no_grad():
        before = model(input_ids=ids).logits
    for _ in range(2):
        optimizer.zero_grad()
        token_loss(model(input_ids=ids).logits, ids).backward()
        for name, parameter in trainable_parameters(model):
            assert parameter.grad is not None, name
            assert parameter.grad.norm() > 0, name
        optimizer.step()
    after = model(input_ids=ids).logits
    expected = adapted_logits(double(model), model.config, ids)
    assert relative_error(after, expected) < ROUNDING
    assert (after - before).abs().max() > 1e-3


def test_decoding_with_a_cache_equals_the_whole_forward_also_after_training(tiny_llama):
    model = adapt(tiny_llama(), "v2")
    ids = tokens(num_rows=1)
    for _ in range(2):
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            steps = [
                model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
                for t in range(9)
            ]
            assert relative_error(torch.cat(steps, dim=1), model(input_ids=ids).logits) < ROUNDING
            for _, parameter in trainable_parameters(model):
                parameter += 0.1


def test_packed_documents_are_computed_as_if_alone(tiny_llama):
    model = adapt(tiny_llama(), "v1")
    ids = tokens(num_rows=1, num_tokens=9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(input_ids=ids, position_ids=positions).logits
    alone = torch.cat([model(input_ids=ids[:, :4]).logits, model(input_ids=ids[:, 4:]).logits], dim=1)
    assert relative_error(packed, alone) < ROUNDING


def test_bf16_gates_and_statistics_are_as_close_to_the_truth_as_the_plain_model(tiny_llama):
    """fp32 softmax statistics: the adapted model's bf16 error is of the size of the base's own."""
    reference = adapt(tiny_llama(), "v1")
    ids = tokens()

    def error(model_fp32) -> float:
        truth = model_fp32(input_ids=ids).logits
        return relative_error(copy.deepcopy(model_fp32).bfloat16()(input_ids=ids).logits, truth.double())

    plain = copy.deepcopy(reference)
    for layer in plain.model.layers[2:]:
        layer.self_attn.zero_init.gate.data.zero_()
    assert error(reference) < 2 * error(plain)
