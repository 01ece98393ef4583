"""The trained norm: transformers' values, the formula's gradients, and nothing kept but its input."""

import copy

import pytest
import torch
from saved_tensors import kept_for_backward
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparse_llama.adapters.norm import AdaptedRMSNorm, normalise, normed_from

EPSILON = 1e-3  # large enough to be seen


def make_norm(dtype: torch.dtype = torch.float32) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(24, eps=EPSILON)
    norm.weight.data += torch.randn(24, generator=torch.Generator().manual_seed(0))
    return norm.to(dtype)


def draw(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_training", [True, False])
def test_values_are_transformers_to_the_bit(dtype, is_training):
    norm = make_norm(dtype)
    with torch.set_grad_enabled(is_training):
        assert torch.equal(AdaptedRMSNorm(norm)(draw(dtype)), norm(draw(dtype)))


def test_an_fp32_weight_changes_no_bit_of_a_16_bit_model():
    norm = make_norm(torch.bfloat16)
    adapted = AdaptedRMSNorm(norm)
    adapted.weight = nn.Parameter(norm.weight.detach().float())
    output = adapted(draw(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, norm(draw(torch.bfloat16)))
    output.sum().backward()
    assert adapted.weight.grad is not None
    assert adapted.weight.grad.dtype == torch.float32


# 16 bits: roundings of 2^-9 (2^-12 in fp16) of each factor
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]
)
def test_gradients_are_the_formulas(dtype, tolerance):
    adapted = AdaptedRMSNorm(make_norm(dtype))
    hidden = draw(dtype).requires_grad_()
    grad = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    adapted(hidden).backward(grad)

    exact = hidden.detach().double().requires_grad_()
    weight = adapted.weight.detach().double().requires_grad_()
    (weight * exact / (exact.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()).backward(grad.double())
    for leaf, other in ((hidden, exact), (adapted.weight, weight)):
        assert leaf.grad is not None
        assert other.grad is not None
        assert leaf.grad.dtype == dtype
        assert (leaf.grad - other.grad).norm() < tolerance * other.grad.norm()


@pytest.mark.parametrize("trained", ["input", "weight"])
def test_one_gradient_comes_without_the_other(trained):
    norm = make_norm().requires_grad_(trained == "weight")
    adapted, plain = AdaptedRMSNorm(norm), copy.deepcopy(norm)
    hidden, expected = (draw().requires_grad_(trained == "input") for _ in range(2))
    adapted(hidden).pow(3).sum().backward()
    plain(expected).pow(3).sum().backward()
    assert (hidden.grad is None) == (expected.grad is None)
    for actual, other in ((hidden, expected), (adapted.weight, plain.weight)):
        if other.grad is not None:
            torch.testing.assert_close(actual.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_but_the_input_in_its_own_dtype(dtype):
    adapted = AdaptedRMSNorm(make_norm(dtype))
    hidden = draw(dtype).requires_grad_()
    (kept,) = kept_for_backward(lambda: adapted(hidden), adapted)
    assert kept.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()


def test_the_weight_stays_the_bases_own():
    norm = make_norm()
    adapted = AdaptedRMSNorm(norm)
    assert adapted.weight is norm.weight
    assert list(adapted.state_dict()) == list(norm.state_dict())


def test_the_output_says_what_it_was_made_from():
    adapted = AdaptedRMSNorm(make_norm())
    hidden = draw()
    output = adapted(hidden)
    normed = normed_from(output)
    assert normed is not None
    assert normed.hidden is hidden
    assert torch.equal(normalise(normed), output)
    assert normed_from(output[:, slice(0, None), :]) is normed  # what transformers gives the head


def test_a_part_a_changed_tensor_and_an_inference_do_not_say():
    adapted = AdaptedRMSNorm(make_norm())
    output = adapted(draw())
    assert normed_from(output[:1]) is None
    assert normed_from(output + 0) is None
    assert normed_from(output.detach().add_(0)) is None
    output.add_(1)
    assert normed_from(output) is None
    with torch.no_grad():
        assert normed_from(adapted(draw())) is None  # it would keep the residual stream alive
