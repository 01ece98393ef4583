"""v2's linear layer: the formula and its gradients, whatever is kept for them, and its start as the base."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from saved_tensors import kept_for_backward
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparse_llama.adapters import linear_parts, scale_bias
from sparse_llama.adapters.norm import AdaptedRMSNorm
from sparse_llama.adapters.scale_bias import Becomes, ScaleBiasLinear

IN, OUT = 24, 16
FEW, MANY = 5, 60  # rows: fewer and more than IN, where the weight is folded
PARTS = {"both": (True, True), "scale": (True, False), "bias": (False, True)}
BECOMES = ["kept", "rotated", "added", "product", "logits"]
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_layer(
    dtype: torch.dtype = torch.float64,
    *,
    becomes: Becomes = "kept",
    has_bias: bool = True,
    parts: str = "both",
    is_trained: bool = True,
) -> ScaleBiasLinear:
    base = nn.Linear(IN, OUT, bias=has_bias, dtype=dtype).requires_grad_(False)
    base.weight.copy_(random(OUT, IN, seed=0) / 5)
    if has_bias:
        base.bias.copy_(random(OUT, seed=1))
    layer = ScaleBiasLinear(base, becomes=becomes)
    for seed, (name, parameter) in enumerate(layer.new_parameters(*PARTS[parts]).items()):
        if is_trained:
            parameter.data = random(OUT, seed=2 + seed).to(dtype)
        setattr(layer, name, parameter)
    return layer


def formula(layer: ScaleBiasLinear, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return scale * (W x + base's bias + bias) by plain fp64 autograd, and the leaves it was made of."""
    leaves = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
    }
    output = F.linear(x, layer.weight.double(), None if layer.bias is None else layer.bias.double())
    output = output + leaves.get("adapter_bias", torch.zeros(OUT))
    return output * leaves.get("adapter_scale", torch.ones(OUT)), leaves


def relative_error(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert actual is not None
    assert expected is not None
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


def check_against_formula(
    layer: ScaleBiasLinear, num_rows: int, tolerance: float, *, but_values: bool = False
) -> None:
    """``but_values``: only the parameters' gradients; of a scale of 0 nothing else can be compared."""
    x = random(num_rows, IN, seed=8, dtype=layer.weight.dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    grad = random(num_rows, OUT, seed=9, dtype=layer.weight.dtype)
    output, (expected, leaves) = layer(x), formula(layer, exact)
    output.backward(grad)
    expected.backward(grad.double())
    if not but_values:
        assert relative_error(output, expected) < tolerance
        with torch.no_grad():
            assert relative_error(layer(x), expected) < tolerance
        assert relative_error(x.grad, exact.grad) < tolerance
    assert leaves
    for name, leaf in leaves.items():
        parameter = layer.get_parameter(name)
        assert relative_error(parameter.grad, leaf.grad) < tolerance, name
        assert parameter.grad.dtype == parameter.dtype  # type: ignore[union-attr]


@pytest.mark.parametrize("num_rows", [FEW, MANY])
@pytest.mark.parametrize("becomes", BECOMES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("parts", PARTS)
def test_values_and_gradients_are_the_formulas(parts, has_bias, becomes, num_rows):
    layer = make_layer(parts=parts, has_bias=has_bias, becomes=becomes)
    check_against_formula(layer, num_rows, ROUNDING[torch.float64])


@pytest.mark.parametrize("num_rows", [FEW, MANY])
@pytest.mark.parametrize("becomes", BECOMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_the_formulas_but_for_rounding(dtype, becomes, num_rows):
    check_against_formula(make_layer(dtype, becomes=becomes), num_rows, ROUNDING[dtype])


@pytest.mark.parametrize("becomes", BECOMES)
def test_finite_differences_agree_also_where_a_scale_is_zero(becomes):
    layer = make_layer(becomes=becomes)
    scale, shift = random(OUT, seed=2).double(), random(OUT, seed=3).double()
    scale[::3] = 0.0

    def run(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"adapter_scale": scale, "adapter_bias": shift}, (x,))

    inputs = (random(2, 3, IN, seed=8).double(), scale, shift)
    assert torch.autograd.gradcheck(run, tuple(tensor.requires_grad_() for tensor in inputs))


@pytest.mark.parametrize("num_rows", [FEW, MANY])
@pytest.mark.parametrize("becomes", BECOMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_negative_and_vanishing_scales_get_their_gradient(dtype, becomes, num_rows):
    """sum(grad * y) / scale knows nothing at 0, where y is 0."""
    layer = make_layer(dtype, becomes=becomes)
    assert layer.adapter_scale is not None
    layer.adapter_scale.data[:8] = torch.tensor([0.0, -0.0, -1.0, -0.5, 0.0, 1e-6, -1e-6, 1e-3])
    check_against_formula(layer, num_rows, ROUNDING[dtype])
    zeroed = layer(random(num_rows, IN, seed=8, dtype=dtype))[:, [0, 1, 4]]
    assert float(zeroed.detach().abs().max()) < 1e-15


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, FEW), (2, MANY), (600, 1)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_it_is_the_base_to_the_bit(dtype, has_bias, shape, is_training):
    x = random(*shape, IN, seed=8, dtype=dtype)
    for parts in PARTS:
        layer = make_layer(dtype, has_bias=has_bias, parts=parts, is_trained=False)
        with torch.set_grad_enabled(is_training):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)), parts


def test_without_scale_and_bias_it_is_the_base():
    layer, x = make_layer(), random(FEW, IN, seed=8).double()
    layer.adapter_scale = layer.adapter_bias = None
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.new_parameters(False, False) == {}


def test_fp32_masters_over_a_16_bit_base_start_as_the_base_and_get_fp32_gradients():
    layer = make_layer(torch.bfloat16, is_trained=False).float()
    layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
    x = random(FEW, IN, seed=8, dtype=torch.bfloat16)
    output = layer(x)
    assert torch.equal(output, F.linear(x, layer.weight, layer.bias))
    output.sum().backward()
    for parameter in (layer.adapter_scale, layer.adapter_bias):
        assert parameter is not None
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("becomes", BECOMES)
def test_an_input_that_needs_no_gradient_gets_none(becomes):
    layer, x = make_layer(becomes=becomes), random(FEW, IN, seed=8).double()
    layer(x).pow(2).sum().backward()
    expected, leaves = formula(layer, x)
    expected.pow(2).sum().backward()
    assert x.grad is None
    assert relative_error(layer.get_parameter("adapter_scale").grad, leaves["adapter_scale"].grad) < 1e-12
    assert relative_error(layer.get_parameter("adapter_bias").grad, leaves["adapter_bias"].grad) < 1e-12


@pytest.mark.parametrize("frozen", ["adapter_scale", "adapter_bias"])
def test_a_frozen_part_gets_no_gradient_and_the_other_does(frozen):
    layer, x = make_layer(), random(FEW, IN, seed=8).double().requires_grad_()
    layer.get_parameter(frozen).requires_grad_(False)
    layer(x).pow(2).sum().backward()
    gradients = {name: parameter.grad is not None for name, parameter in layer.named_parameters()}
    expected = {"weight": False, "bias": False, "adapter_scale": True, "adapter_bias": True}
    assert gradients == expected | {frozen: False}


def test_a_base_that_trains_gets_its_gradient():
    layer, x = make_layer(), random(FEW, IN, seed=8).double()
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    expected = layer.get_parameter("adapter_scale")[:, None] * x.sum(0)
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("becomes", BECOMES)
def test_16_bit_gradients_are_summed_over_rows_in_fp32(monkeypatch, becomes):
    """A bf16 sum stands still at 256: 256 + 1 rounds to 256."""
    monkeypatch.setattr(linear_parts, "_SLICE", 1)
    monkeypatch.setattr(scale_bias, "_LEAST_ROWS", 1)  # every row is a slice of its own
    layer = make_layer(torch.bfloat16, becomes=becomes, has_bias=False, is_trained=False)
    layer.weight.data = torch.zeros(OUT, IN, dtype=torch.bfloat16)
    layer.weight.data[:, 0] = 1.0  # z = x_0
    x = torch.ones(600, IN, dtype=torch.bfloat16)
    layer(x).sum().backward()
    assert layer.get_parameter("adapter_scale").grad.tolist() == [600.0] * OUT  # type: ignore[union-attr]
    assert layer.get_parameter("adapter_bias").grad.tolist() == [600.0] * OUT  # type: ignore[union-attr]


@pytest.mark.parametrize("becomes", BECOMES)
def test_products_too_small_for_fp16_are_not_lost_from_their_sum(becomes):
    layer = make_layer(torch.float16, becomes=becomes, parts="scale", is_trained=False, has_bias=False)
    layer.weight.data = torch.eye(OUT, IN, dtype=torch.float16)  # z = x
    x = torch.full((64, IN), 2**-12, dtype=torch.float16)
    layer(x).backward(torch.full((64, OUT), 2**-14, dtype=torch.float16))  # 2^-26 is 0 in fp16
    assert layer.get_parameter("adapter_scale").grad.tolist() == [2**-20] * OUT  # type: ignore[union-attr]


@pytest.mark.parametrize("becomes", BECOMES)
def test_slices_of_rows_sum_to_the_whole(monkeypatch, becomes):
    monkeypatch.setattr(linear_parts, "_SLICE", 1)
    monkeypatch.setattr(scale_bias, "_LEAST_ROWS", 7)  # 60 rows: the last slice is shorter
    check_against_formula(make_layer(becomes=becomes), MANY, ROUNDING[torch.float64])


PRODUCT, OUTPUT, INPUT = "product", "output", "input"
KEPT = {
    (torch.float32, "kept"): OUTPUT,
    (torch.float32, "rotated"): INPUT,
    (torch.float32, "added"): PRODUCT,
    (torch.float32, "product"): PRODUCT,
    (torch.float32, "logits"): INPUT,
    (torch.bfloat16, "kept"): OUTPUT,
    (torch.bfloat16, "rotated"): PRODUCT,
    (torch.float16, "kept"): INPUT,  # y vanishes where the scale is small
    (torch.float16, "rotated"): PRODUCT,
}


@pytest.mark.parametrize(("dtype", "becomes"), KEPT)
@pytest.mark.parametrize("has_norm", [False, True])
def test_only_one_tensor_is_kept(has_norm, dtype, becomes):
    """z, or what somebody keeps anyway: the output, which attention keeps; a norm's input; else the input."""
    layer = make_layer(dtype, becomes=becomes)
    norm = AdaptedRMSNorm(LlamaRMSNorm(IN).to(dtype)) if has_norm else nn.Identity()
    model = nn.Sequential(norm, layer)
    hidden = random(FEW, IN, seed=8, dtype=dtype).requires_grad_()
    kept = kept_for_backward(lambda: model(hidden), model)
    shift = layer.get_parameter("adapter_bias")
    product = F.linear(norm(hidden), layer.weight, (layer.bias + shift).to(dtype))
    what = KEPT[dtype, becomes]
    expected = [{PRODUCT: product, OUTPUT: model(hidden), INPUT: hidden}[what]]
    if has_norm and what != INPUT:
        expected = [hidden, *expected]  # the norm's own
    assert len(kept) == len(expected)
    for actual, other in zip(kept, expected, strict=True):
        assert torch.equal(actual, other)


@pytest.mark.parametrize("becomes", ["kept", "rotated"])
def test_where_every_tensor_counts_nothing_is_kept_but_a_norms_input(becomes):
    layer = make_layer(torch.bfloat16, becomes=becomes)
    layer.remakes = True
    model = nn.Sequential(AdaptedRMSNorm(LlamaRMSNorm(IN).bfloat16()), layer)
    hidden = random(FEW, IN, seed=8, dtype=torch.bfloat16).requires_grad_()
    (kept,) = kept_for_backward(lambda: model(hidden), model)
    assert torch.equal(kept, hidden)
    check_against_formula(layer, MANY, ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("becomes", BECOMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_scales_gradient_is_as_good_at_any_scale(dtype, becomes):
    """y / scale is as exact as z in fp32 and bf16, whose exponents reach far; in fp16 a small y has none."""
    for scale in (1.0, 1e-2, 1e-4, 1e-6, 1e-8, 0.0):
        layer = make_layer(dtype, becomes=becomes, has_bias=False, parts="scale")
        layer.weight.data = layer.weight.data / 16  # z of about 0.1
        assert layer.adapter_scale is not None
        layer.adapter_scale.data.fill_(scale)
        check_against_formula(layer, MANY, ROUNDING[dtype], but_values=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_a_norm_the_gradients_are_plain_autograds(dtype):
    """The rotated layer makes its input anew from the norm's."""
    norm = LlamaRMSNorm(IN).to(dtype)
    norm.weight.data += random(IN, seed=6).to(dtype)
    layer = make_layer(dtype, becomes="logits")
    hidden = 3 * random(2, MANY, IN, seed=8, dtype=dtype)
    layer(AdaptedRMSNorm(norm)(hidden)).pow(2).sum().backward()

    weight, exact = norm.weight.detach().double().requires_grad_(), hidden.double()
    normalised = exact / (exact.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    expected, leaves = formula(layer, weight * normalised)
    expected.pow(2).sum().backward()
    assert relative_error(norm.weight.grad, weight.grad) < ROUNDING[dtype]
    for name, leaf in leaves.items():
        assert relative_error(layer.get_parameter(name).grad, leaf.grad) < ROUNDING[dtype], name


@pytest.mark.parametrize("becomes", BECOMES)
def test_under_autocast_it_computes_in_16_bits_and_its_parameters_stay_fp32(becomes):
    layer = make_layer(torch.float32, becomes=becomes)
    norm = AdaptedRMSNorm(LlamaRMSNorm(IN))
    hidden = random(MANY, IN, seed=8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(norm(hidden))
    assert output.dtype == torch.bfloat16
    output.backward(random(MANY, OUT, seed=9, dtype=torch.bfloat16))
    exact = norm(hidden).detach().double()
    expected, leaves = formula(layer, exact)
    expected.backward(random(MANY, OUT, seed=9, dtype=torch.bfloat16).double())
    assert relative_error(output, expected) < ROUNDING[torch.bfloat16]
    for name, leaf in leaves.items():
        assert relative_error(layer.get_parameter(name).grad, leaf.grad) < ROUNDING[torch.bfloat16], name
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("num_rows", "scaled"), [(1, OUT), (IN, IN * OUT), (IN + 1, IN * OUT), (MANY, IN * OUT)]
)
def test_an_inference_scales_the_product_or_the_weight_whichever_is_smaller(num_rows, scaled):
    sizes: list[int] = []

    class Multiplications(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor):
                sizes.append(output.numel())
            return output

    layer = make_layer(torch.float32, has_bias=False, parts="scale")
    with torch.inference_mode(), Multiplications():
        layer(random(num_rows, IN, seed=8))
    assert sizes == [scaled]


def test_names_and_parameters_are_the_bases_own():
    base = nn.Linear(IN, OUT)
    layer = ScaleBiasLinear(base)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert list(layer.state_dict()) == list(base.state_dict())
