"""Several adapters on one base: switched, mixed, left out."""

import copy
from typing import Any

import pytest
import torch
from adapted_models import tokens
from oracles.adapter_formula import adapted_logits
from transformers import LlamaForCausalLM

from sparse_llama.adapters.attach import attach_adapters, trainable_parameters
from sparse_llama.adapters.bank import (
    active_adapters,
    bank_of,
    delete_adapter,
    disable_adapters,
    require_bank,
    set_adapter,
)
from sparse_llama.attention.interface import plan_attention
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import ConfigError

ROUNDING = 3e-5  # fp32 against fp64, as in test_zero_init.py
VARIANTS: dict[str, dict[str, Any]] = {
    "v1": {"version": "v1", "prompt_length": 3},
    "v2": {"version": "v2", "prompt_length": 5, "start_layer": 1},
    "top": {
        "version": "v2",
        "prompt_length": 2,
        "top_layers": 1,
        "gate": "scalar",
        "gate_activation": "tanh",
    },
    "biases": {"version": "v2", "scale": False, "bias": ["q_proj", "down_proj"], "lm_head": False},
}


def add(model: LlamaForCausalLM, name: str, **settings: Any) -> None:
    """Add an adapter with every tensor away from its start, other ones for other names."""
    attach_adapters(model, AdapterSettings.parse(VARIANTS[name] | settings), name=name, seed=1)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for parameter in require_bank(model).adapters[name].parameters.values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def alone(make: Any, name: str, **base: Any) -> torch.Tensor:
    model = make(**base)
    add(model, name)
    return logits(model)


@pytest.mark.parametrize("base", [{}, {"attention_bias": True, "tie_word_embeddings": True}])
def test_each_adapter_computes_among_others_what_it_computes_alone(tiny_llama, base):
    model = tiny_llama(**base)
    plain = logits(model)
    for name in VARIANTS:
        add(model, name)
    for name in ("v2", "top", "v1", "biases", "v1"):
        set_adapter(model, name)
        assert torch.equal(logits(model), alone(tiny_llama, name, **base)), name
        assert active_adapters(model) == {name: 1.0}
        with disable_adapters(model):
            torch.testing.assert_close(logits(model), plain)
            assert active_adapters(model) == {}


def test_without_its_adapters_a_model_is_the_base_to_the_bit(tiny_llama):
    model, base = tiny_llama(), tiny_llama()
    attach_adapters(base, AdapterSettings(version="v1"))  # the same attention function, nothing else
    expected = logits(base)
    add(model, "v1")
    add(model, "v2")
    assert not torch.equal(logits(model), expected)
    with disable_adapters(model):
        assert torch.equal(logits(model), expected)
        assert not trainable_parameters(model)
    assert not torch.equal(logits(model), expected)


def test_an_error_within_the_block_brings_the_adapter_back(tiny_llama):
    model = tiny_llama()
    add(model, "v2")
    expected = logits(model)
    with pytest.raises(KeyError), disable_adapters(model):
        raise KeyError
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("old", "new"), [("v2", "v1"), ("v2", "biases"), ("v1", "top")])
def test_one_of_the_same_name_is_replaced_with_all_its_parts(tiny_llama, old, new):
    """Or a scale that the new one has not would go on scaling."""
    model = tiny_llama()
    add(model, old)
    attach_adapters(model, AdapterSettings.parse(VARIANTS[new]), name=old, seed=1)
    generator = torch.Generator().manual_seed(sum(map(ord, new)))
    for parameter in require_bank(model).adapters[old].parameters.values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    assert torch.equal(logits(model), alone(tiny_llama, new))
    with disable_adapters(model):
        torch.testing.assert_close(logits(model), logits(tiny_llama()))


def test_an_adapter_keeps_its_parameters_for_its_optimizer(tiny_llama):
    """Or training one, looking at another and training on would move nothing."""
    model = tiny_llama()
    add(model, "v2")
    before = dict(trainable_parameters(model))
    add(model, "v1")
    set_adapter(model, "v2")
    after = dict(trainable_parameters(model))
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def test_a_mixture_of_one_is_that_one_and_of_none_the_base(tiny_llama):
    model = tiny_llama()
    for name in VARIANTS:
        add(model, name)
    with disable_adapters(model):
        base = logits(model)
    for name in VARIANTS:
        set_adapter(model, {name: 1.0})
        expected = logits(model)
        others = {other: 0.0 for other in VARIANTS if other != name}
        set_adapter(model, {name: 1.0} | others)
        torch.testing.assert_close(logits(model), expected)
    set_adapter(model, dict.fromkeys(VARIANTS, 0.0))
    torch.testing.assert_close(logits(model), base)


def test_a_mixture_is_the_formula_with_mixed_tensors(tiny_llama):
    """Scales, biases and norms move by the weighted sum; each prompt has a softmax of its own, which the
    formula knows for one prompt only: so the second adapter has none here (its gates are 0)."""
    model = tiny_llama()
    add(model, "v2")
    add(model, "biases")
    first, second = (require_bank(model).adapters[name].parameters for name in ("v2", "biases"))
    for path, parameter in second.items():
        if path.endswith("gate"):
            parameter.data.zero_()
    base = tiny_llama().state_dict()
    weights = {path: tensor.double() for path, tensor in base.items()}
    for path, parameter in first.items():
        weights[path] = parameter.detach().double()
        if path.endswith("gate"):
            weights[path] *= 0.25
        elif not path.endswith("prompt"):
            start = base.get(path, torch.tensor(1.0 if path.endswith("scale") else 0.0)).double()
            weights[path] = start + 0.25 * (weights[path] - start)
    for path, parameter in second.items():
        if not path.endswith(("gate", "prompt")):
            start = base.get(path, torch.tensor(0.0)).double()
            weights[path] = weights[path] + 1.5 * (parameter.detach().double() - start)
    set_adapter(model, {"v2": 0.25, "biases": 1.5})
    expected = adapted_logits(weights, model.config, tokens())
    assert float((logits(model).double() - expected).norm() / expected.norm()) < ROUNDING
    assert not trainable_parameters(model)


def test_the_prompts_of_a_mixture_attend_side_by_side(tiny_llama):
    """Two adapters of the same prompts at gates that add up are one adapter at their sum."""
    model = tiny_llama()
    add(model, "v1")
    expected = logits(model)
    bank = require_bank(model)
    attach_adapters(model, bank.adapters["v1"].settings, name="again")
    for path, parameter in bank.adapters["again"].parameters.items():
        parameter.data.copy_(bank.adapters["v1"].parameters[path].data)
    set_adapter(model, {"v1": 0.75, "again": 0.25})
    torch.testing.assert_close(logits(model), expected)


def test_decoding_with_a_mixture_is_the_whole_forward(tiny_llama):
    model = tiny_llama()
    add(model, "v1")
    add(model, "top")
    set_adapter(model, {"v1": 0.5, "top": 0.5})
    whole, cache, steps = logits(model), None, []
    for token in tokens().split(1, dim=1):
        with torch.no_grad():
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_each_adapter_brings_its_layout(tiny_llama):
    block = {"mode": "local_sliding_window", "block": 2, "num_sliding_window_blocks": 2}
    model = tiny_llama()
    dense = alone(tiny_llama, "v1")
    config = model.config
    plan = plan_attention(
        (parse_sparsity(block),) * config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        master_length=64,
        seed=0,
    )
    add(model, "v1")
    attach_adapters(model, AdapterSettings.parse(VARIANTS["v1"]), name="sparse", plan=plan)
    sparse = logits(model)
    set_adapter(model, "v1")
    assert torch.equal(logits(model), dense)
    set_adapter(model, "sparse")
    assert torch.equal(logits(model), sparse)
    with disable_adapters(model):
        torch.testing.assert_close(logits(model), logits(tiny_llama()))
    with pytest.raises(ConfigError, match="v1, sparse were trained with different attention layouts"):
        set_adapter(model, {"v1": 0.5, "sparse": 0.5})
    assert torch.equal(logits(model), sparse)


def test_a_copy_of_the_model_has_adapters_of_its_own(tiny_llama):
    model = tiny_llama()
    add(model, "v2")
    add(model, "v1")
    twin = copy.deepcopy(model)
    before = logits(model)
    for parameter in require_bank(twin).adapters["v2"].parameters.values():
        parameter.data.zero_()
    set_adapter(twin, "v2")
    assert torch.equal(logits(model), before)
    set_adapter(model, "v2")
    assert torch.equal(logits(model), alone(tiny_llama, "v2"))


def test_a_deleted_adapter_is_gone_and_the_base_computes(tiny_llama):
    model = tiny_llama()
    add(model, "v1")
    add(model, "v2")
    delete_adapter(model, "v2")
    assert active_adapters(model) == {}
    set_adapter(model, "v1")
    assert torch.equal(logits(model), alone(tiny_llama, "v1"))
    with pytest.raises(ConfigError, match="no adapter is called 'v2'; there are 'v1'"):
        delete_adapter(model, "v2")


def test_mistakes_say_what_there_is(tiny_llama):
    model = tiny_llama()
    with pytest.raises(
        ConfigError, match="the model has no adapter; attach_adapters or load_adapter adds one"
    ):
        set_adapter(model, "v1")
    assert bank_of(model) is None
    add(model, "v1")
    with pytest.raises(ConfigError, match="no adapter is called 'law'; there are 'v1'"):
        set_adapter(model, {"v1": 0.5, "law": 0.5})
    with pytest.raises(ConfigError, match="no adapter is named"):
        set_adapter(model, {})
    assert torch.equal(logits(model), alone(tiny_llama, "v1"))
