"""The MLP whose product is one node: transformers' values and gradients, and one tensor less.

``F`` the MLP's width.
"""

import copy

import pytest
import torch
from saved_tensors import kept_for_backward
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaMLP

from sparse_llama.adapters.mlp import AdaptedMLP
from sparse_llama.adapters.scale_bias import Becomes, ScaleBiasLinear

BECOMES: dict[str, Becomes] = {"gate_proj": "product", "up_proj": "product", "down_proj": "added"}


class Passing(torch.autograd.Function):
    """What DeepSpeed's hooks wrap a module's inputs in: a node that knows no forward mode."""

    @staticmethod
    def forward(ctx, input):
        return input.detach()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad


def make_mlp(tiny_config, dtype: torch.dtype = torch.float32, activation: str = "silu") -> LlamaMLP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaMLP(tiny_config(hidden_act=activation, mlp_bias=True)).to(dtype)


def adapt(mlp: LlamaMLP, parts: dict[str, tuple[bool, bool]]) -> AdaptedMLP:
    """Return ``mlp``, frozen, with the scales and biases named, away from where they do nothing."""
    mlp.requires_grad_(False)
    for seed, (name, wanted) in enumerate(parts.items()):
        layer = ScaleBiasLinear(mlp.get_submodule(name), becomes=BECOMES[name])  # type: ignore[arg-type]
        for kind, parameter in layer.new_parameters(*wanted).items():
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            setattr(layer, kind, parameter)
        setattr(mlp, name, layer)
    return AdaptedMLP(mlp)


def formula(
    mlp: AdaptedMLP, x: torch.Tensor, activation: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output by plain fp64 autograd, and the leaves that train."""
    leaves: dict[str, torch.Tensor] = {
        name: one.detach().double().requires_grad_()
        for name, one in mlp.named_parameters()
        if one.requires_grad
    }

    def linear(name: str, rows: torch.Tensor) -> torch.Tensor:
        layer = mlp.get_submodule(name)
        output = functional.linear(rows, layer.weight.double(), layer.bias.double())  # type: ignore[operator]
        output = output + leaves.get(f"{name}.adapter_bias", 0.0)
        return output * leaves.get(f"{name}.adapter_scale", 1.0)

    gate = getattr(functional, activation)(linear("gate_proj", x))
    return linear("down_proj", gate * linear("up_proj", x)), leaves


def draw(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (4 * torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))).to(dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_transformers_to_the_bit(tiny_config, dtype, activation):
    mlp = make_mlp(tiny_config, dtype, activation)
    adapted, plain = AdaptedMLP(copy.deepcopy(mlp)), mlp
    inputs = [draw(dtype).requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((adapted, plain), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.pow(2).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
    expected = dict(plain.named_parameters())
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter.grad, expected[name].grad), name  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(adapted(inputs[0]), outputs[1])


def test_nothing_is_kept_but_the_two_factors(tiny_config):
    adapted = AdaptedMLP(make_mlp(tiny_config).requires_grad_(False))
    x = draw().requires_grad_()
    kept = kept_for_backward(lambda: adapted(x), adapted)
    factors = [adapted.gate_proj(x), adapted.up_proj(x)]
    assert [torch.equal(*pair) for pair in zip(kept, factors, strict=True)] == [True, True]


def test_hooks_on_the_activation_that_know_no_forward_mode_do_no_harm(tiny_config):
    plain = make_mlp(tiny_config)
    adapted = AdaptedMLP(copy.deepcopy(plain))
    adapted.act_fn.register_forward_pre_hook(lambda _, inputs: tuple(map(Passing.apply, inputs)))
    inputs = [draw().requires_grad_() for _ in range(2)]
    for module, x in zip((adapted, plain), inputs, strict=True):
        module(x).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]


def test_layers_and_names_are_the_bases(tiny_config):
    mlp = make_mlp(tiny_config)
    adapted = AdaptedMLP(mlp)
    assert list(adapted.state_dict()) == list(mlp.state_dict())
    assert all(adapted.get_submodule(name) is child for name, child in mlp.named_children())


VARIANTS = {
    "all": dict.fromkeys(BECOMES, (True, True)),
    "scales": dict.fromkeys(BECOMES, (True, False)),
    "biases": dict.fromkeys(BECOMES, (False, True)),
    "gate's": {"gate_proj": (True, True)},
    "up's scale": {"up_proj": (True, False)},
}


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapted_its_gradients_are_plain_autograds(tiny_config, variant, activation):
    """Of scales too, one of which is 0: from z, which y does not know there (memory trap 5)."""
    adapted = adapt(make_mlp(tiny_config, activation=activation), VARIANTS[variant])
    for name, parameter in adapted.named_parameters():
        if name.endswith("adapter_scale"):
            parameter.data[:3] = torch.tensor([0.0, 1e-8, -1e-4])
    x = draw().requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected, leaves = formula(adapted, exact, activation)
    output = adapted(x)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-3)
    output.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for name, leaf in (*leaves.items(), ("x", exact)):
        grad = x.grad if name == "x" else adapted.get_parameter(name).grad
        assert grad is not None, name
        assert leaf.grad is not None
        assert (grad.double() - leaf.grad).norm() < 2e-6 * leaf.grad.norm(), name


def test_adapted_it_keeps_the_unscaled_products(tiny_config):
    """2F + C numbers per token, of which C are down's: no factor twice, scaled and not."""
    adapted = adapt(make_mlp(tiny_config), VARIANTS["all"])
    x = draw().requires_grad_()
    kept = kept_for_backward(lambda: adapted(x), adapted)
    assert sorted(tensor.shape[-1] for tensor in kept) == [32, 48, 48]
    products = [adapted.gate_proj(x, is_scaled=False), adapted.up_proj(x, is_scaled=False)]
    for product in products:
        assert any(torch.equal(product, one) for one in kept if one.shape == product.shape)
