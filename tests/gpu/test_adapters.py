"""Adapted models on a CUDA device against the formula in fp64: run with ``pytest -m gpu``."""

import pytest
import torch
from adapted_models import adapt, shake, tokens
from oracles.adapter_formula import adapted_logits, token_loss

from sparse_llama.adapters import AdapterConfig, attach_adapters
from sparse_llama.adapters.attach import trainable_parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# relative L2 error of the logits; 16 bits through 4 layers whose weights make scores of up to 30
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1}
VARIANTS = {
    "v1": {"version": "v1"},
    "v2": {"version": "v2"},
    "top": {"top_layers": 2, "gate": "scalar", "gate_activation": "tanh"},
    "biases": {"scale": False, "bias": ["q_proj", "down_proj"], "lm_head": False},
}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_rows", [2, 8])  # 18 rows scale what a product gives, 72 fold the scale first
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_the_formulas(tiny_llama, variant, dtype, num_rows):
    model = tiny_llama()
    settings = AdapterConfig.parse({"prompt_length": 3} | VARIANTS[variant])
    attach_adapters(model, settings)
    shake(model, 0.2)
    for parameter in model.parameters():  # the base is rounded before the formula sees it
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    weights = {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}
    given = dict(weights)
    for name in weights:
        linear, _, kind = name.rpartition(".")
        if kind == "gate":
            gate = weights[name].tanh() if settings.gate_activation == "tanh" else weights[name]
            given[name] = gate.expand(4)
        elif kind == "adapter_bias" and f"{linear}.adapter_scale" not in weights:
            given[f"{linear}.adapter_scale"] = torch.ones_like(weights[name])
    ids = tokens(num_rows=num_rows)
    expected = adapted_logits(given, model.config, ids)
    token_loss(expected, ids).backward()

    model.to("cuda")
    logits = model(input_ids=ids.cuda()).logits
    assert error(logits, expected) < ROUNDING[dtype]
    if dtype != torch.float32:  # sums that cancel: nothing that a bound would tell from a mistake
        return
    token_loss(logits, ids.cuda()).backward()
    for name, parameter in trainable_parameters(model):
        assert parameter.grad is not None, name
        assert error(parameter.grad, weights[name].grad) < ROUNDING[dtype], name


def test_an_untrained_v1_changes_no_bit_of_the_base(tiny_llama):
    """v2 gives its biases to the matrix product, whose algorithm cuBLAS chooses by that."""
    plain, adapted = (tiny_llama().to("cuda", torch.bfloat16) for _ in range(2))
    adapt(plain, "v1", is_trained=False)
    for layer in plain.model.layers:
        if hasattr(layer.self_attn, "zero_init"):
            del layer.self_attn.zero_init
    adapt(adapted, "v1", is_trained=False)
    ids = tokens().cuda()
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=ids).logits, plain(input_ids=ids).logits)
