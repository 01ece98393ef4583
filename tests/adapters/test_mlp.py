"""The MLP whose product is one node: transformers' values and gradients, and one tensor less."""

import copy

import pytest
import torch
from saved_tensors import kept_for_backward
from transformers.models.llama.modeling_llama import LlamaMLP

from sparse_llama.adapters.mlp import AdaptedMLP


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
