"""Tiled norms and MLPs compute what the untiled ones do; what they save is ``test_tiled_memory.py``'s."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapted_models import adapt, tokens
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from sparse_llama.adapters.attach import first_trained_layer, trainable_parameters
from sparse_llama.adapters.bank import disable_adapters
from sparse_llama.adapters.norm import AdaptedRMSNorm
from sparse_llama.adapters.scale_bias import ScaleBiasLinear
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.config.settings import MemorySettings
from sparse_llama.memory.checkpointing import checkpoint_layers
from sparse_llama.memory.tiles import TiledMLP, tile_layers

WIDTH, INNER = 12, 20
LAYERS = ("gate_proj", "up_proj", "down_proj")
PARTS: dict[str, dict[str, tuple[bool, bool]]] = {
    "v1": {},
    "v2": dict.fromkeys(LAYERS, (True, True)),
    "biases": dict.fromkeys(LAYERS, (False, True)),
    "scales": dict.fromkeys(LAYERS, (True, False)),
    "the gate's": {"gate_proj": (True, True)},
    "down's scale": {"down_proj": (True, False)},
}
"""Which layer has a scale, and which a bias."""


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_mlp(
    parts: str = "v2", dtype: torch.dtype = torch.float64, *, activation: str = "silu", has_bias: bool = True
) -> LlamaMLP:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 1}
    mlp = LlamaMLP(LlamaConfig(**sizes, hidden_act=activation, mlp_bias=has_bias)).to(dtype)
    for seed, parameter in enumerate(mlp.requires_grad_(False).parameters()):
        parameter.copy_(random(*parameter.shape, seed=seed) / 3)
    for seed, (name, wanted) in enumerate(PARTS[parts].items()):
        layer = ScaleBiasLinear(mlp.get_submodule(name))  # type: ignore[arg-type]
        for kind, parameter in layer.new_parameters(*wanted).items():
            setattr(layer, kind, parameter)
            parameter.data = random(layer.out_features, seed=20 + seed).to(dtype)
        setattr(mlp, name, layer)
    return mlp


def mlp_formula(mlp: LlamaMLP, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output by plain fp64 autograd, and the leaves that train."""
    leaves: dict[str, torch.Tensor] = {}

    def linear(name: str, rows: torch.Tensor) -> torch.Tensor:
        layer: Any = mlp.get_submodule(name)
        output = F.linear(rows, layer.weight.double(), None if layer.bias is None else layer.bias.double())
        for kind, parameter in layer.named_parameters():
            if kind.startswith("adapter"):
                leaves[f"{name}.{kind}"] = parameter.detach().double().requires_grad_()
        output = output + leaves.get(f"{name}.adapter_bias", 0.0)
        return output * leaves.get(f"{name}.adapter_scale", 1.0)

    activation: Callable[[torch.Tensor], torch.Tensor] = mlp.act_fn
    return linear("down_proj", activation(linear("gate_proj", x)) * linear("up_proj", x)), leaves


def relative_error(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert actual is not None
    assert expected is not None
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


def check_mlp(mlp: LlamaMLP, shape: tuple[int, int], tile: int, tolerance: float) -> None:
    dtype = mlp.down_proj.weight.dtype
    x = random(*shape, WIDTH, seed=8, dtype=dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    grad = random(*shape, WIDTH, seed=9, dtype=dtype)
    tiled = TiledMLP(mlp, tile)
    output, (expected, leaves) = tiled(x), mlp_formula(mlp, exact)
    assert output.shape == x.shape
    assert relative_error(output, expected) < tolerance
    with torch.no_grad():
        assert torch.equal(tiled(x), output)
    output.backward(grad)
    expected.backward(grad.double())
    assert relative_error(x.grad, exact.grad) < tolerance
    trained = dict(trainable_parameters(tiled))
    assert trained.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert relative_error(trained[name].grad, leaf.grad) < tolerance, name


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("parts", PARTS)
def test_an_mlps_values_and_gradients_are_the_formulas(parts, has_bias):
    check_mlp(make_mlp(parts, has_bias=has_bias), (2, 7), 4, 1e-12)


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_any_activation_will_do(activation):
    check_mlp(make_mlp(activation=activation), (2, 7), 4, 1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 1), (2, 7), (3, 8)])
def test_any_tile_will_do_for_any_length(shape):
    """Memory trap 12: not a divisor, longer than everything, one token, tiles across rows."""
    for tile in (*range(1, 10), 24, 25, 1000):
        check_mlp(make_mlp(), shape, tile, 1e-12)


# roundings of 2^-24, 2^-9 and 2^-12 of each of some ten factors
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_in_fewer_bits_it_is_as_near_to_the_formula_as_rounding_allows(dtype, tolerance):
    check_mlp(make_mlp(dtype=dtype), (2, 50), 16, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scales_of_zero_and_next_to_it_get_their_gradient(dtype):
    """Memory trap 5: from z itself, where y / scale would know nothing."""
    mlp = make_mlp(dtype=dtype)
    for name in LAYERS:
        scale: Any = mlp.get_submodule(name).adapter_scale
        scale.data[:4] = torch.tensor([0.0, -0.0, 1e-8, -1e-5])
    check_mlp(mlp, (2, 7), 4, {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 2e-2))


def test_a_thousand_tiles_sum_as_one():
    """Memory trap 8: in fp32 whatever the model is in, so that no tile is lost."""
    grads = []
    for tile in (1, 1000):
        mlp = TiledMLP(make_mlp(dtype=torch.float32), tile)
        mlp(random(1000, WIDTH, seed=8, dtype=torch.float32)).square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in trainable_parameters(mlp)})
    for name, grad in grads[0].items():
        assert relative_error(grad, grads[1][name].double()) < 1e-6, name


def test_a_16_bit_sum_over_tiles_does_not_stand_still():
    """In bf16 256 + 1 is 256."""
    mlp = make_mlp("down's scale", torch.bfloat16, has_bias=False, activation="relu")
    mlp.gate_proj.weight.data = torch.eye(INNER, WIDTH, dtype=torch.bfloat16)
    mlp.up_proj.weight.data = torch.eye(INNER, WIDTH, dtype=torch.bfloat16)
    mlp.down_proj.weight.data = torch.eye(WIDTH, INNER, dtype=torch.bfloat16)  # z = relu(x) * x
    TiledMLP(mlp, 1)(torch.ones(600, WIDTH, dtype=torch.bfloat16)).sum().backward()
    assert mlp.down_proj.adapter_scale.grad.tolist() == [600.0] * WIDTH  # type: ignore[union-attr]


def test_it_may_be_gone_through_twice():
    """Memory trap 13: nothing is overwritten that a second backward pass, or a hook, might want."""
    mlp = TiledMLP(make_mlp(), 4)
    x = random(2, 7, WIDTH, seed=8).requires_grad_()
    output = mlp(x)
    grad = random(2, 7, WIDTH, seed=9)
    before = grad.clone()
    leaves = [x, *(parameter for _, parameter in trainable_parameters(mlp))]
    first = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(output, leaves, grad)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert torch.equal(grad, before)


def test_an_input_that_needs_no_gradient_gets_none_and_the_parameters_do():
    mlp = make_mlp()
    x = random(2, 7, WIDTH, seed=8)
    TiledMLP(mlp, 4)(x).square().sum().backward()
    expected, leaves = mlp_formula(mlp, x)
    expected.square().sum().backward()
    for name, parameter in trainable_parameters(mlp):
        assert relative_error(parameter.grad, leaves[name].grad) < 1e-12, name


def test_under_autocast_it_computes_in_16_bits_and_its_parameters_stay_fp32():
    mlp = make_mlp(dtype=torch.float32)
    x = random(2, 7, WIDTH, seed=8, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = TiledMLP(mlp, 4)(x)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    exact = x.detach().double().requires_grad_()
    expected, leaves = mlp_formula(mlp, exact)
    expected.sum().backward()
    assert relative_error(x.grad, exact.grad) < 2e-2
    for name, parameter in trainable_parameters(mlp):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert relative_error(parameter.grad, leaves[name].grad) < 2e-2, name


def make_norm(dtype: torch.dtype, *, is_trained: bool) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(24, eps=1e-3).to(dtype)  # large enough to be seen
    norm.weight.data += random(24, seed=0).to(dtype)
    return norm.requires_grad_(is_trained)


@pytest.mark.parametrize("tile", [1, 4, 14, 100])
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]
)
def test_a_norms_values_are_transformers_to_the_bit_and_its_gradients_the_formulas(
    dtype, tolerance, is_trained, tile
):
    norm = make_norm(dtype, is_trained=is_trained)
    tiled = AdaptedRMSNorm(norm, tile=tile)
    x = random(2, 7, 24, seed=1, dtype=dtype).requires_grad_()
    grad = random(2, 7, 24, seed=2, dtype=dtype)
    assert torch.equal(tiled(x), norm(x))
    with torch.no_grad():
        assert torch.equal(tiled(x), norm(x))
    tiled(x).backward(grad)
    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    (weight * exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()).backward(grad.double())
    assert relative_error(x.grad, exact.grad) < tolerance
    if is_trained:
        assert relative_error(tiled.weight.grad, weight.grad) < tolerance
    else:
        assert tiled.weight.grad is None


def test_a_thousand_tiles_of_a_norm_sum_as_one():
    grads = []
    for tile in (1, 1000):
        norm = AdaptedRMSNorm(make_norm(torch.float32, is_trained=True), tile=tile)
        norm(random(1000, 24, seed=1, dtype=torch.float32)).pow(3).sum().backward()
        grads.append(norm.weight.grad)
    assert relative_error(grads[0], grads[1].double()) < 1e-6  # type: ignore[union-attr]


TILES = MemorySettings(mlp_tile=5, norm_tile=7)


def train_forward(model: LlamaForCausalLM) -> torch.Tensor:
    return model.train()(input_ids=tokens(), use_cache=False).logits


def train(model: LlamaForCausalLM) -> torch.Tensor:
    logits = train_forward(model)
    loss = logits.log_softmax(-1)[..., 0].sum()
    loss.backward()
    return loss.detach()


# fp64: transformers' own norm rounds to fp32, so that its gradients differ by a rounding of that
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
def test_a_tiled_model_trains_as_an_untiled_one(tiny_llama, dtype, tolerance, version, is_checkpointed):
    plain, tiled = (adapt(tiny_llama(hidden_act="gelu").to(dtype), version) for _ in range(2))
    tile_layers(tiled, TILES)
    settings = ActivationCheckpointing() if is_checkpointed else None
    checkpoint_layers(tiled, settings, first_trained_layer(tiled))
    assert relative_error(train(tiled), train(plain).double()) < tolerance
    expected = dict(trainable_parameters(plain))
    assert [name for name, _ in trainable_parameters(tiled)] == list(expected)
    for name, parameter in trainable_parameters(tiled):
        assert relative_error(parameter.grad, expected[name].grad.double()) < tolerance, name  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "variant",
    [{"scale": ["gate_proj"], "bias": False, "norm": False}, {"scale": False, "bias": ["up_proj", "v_proj"]}],
    ids=["a scale of gate", "biases of up and v"],
)
def test_a_model_with_parts_of_v2_trains_as_an_untiled_one(tiny_llama, variant):
    variant = {**variant, "lm_head": False, "top_layers": 2, "start_layer": None}
    plain, tiled = (adapt(tiny_llama(), "v2", **variant) for _ in range(2))
    tile_layers(tiled, TILES)
    for model in (plain, tiled):
        train(model)
    expected = dict(trainable_parameters(plain))
    for name, parameter in trainable_parameters(tiled):
        assert relative_error(parameter.grad, expected[name].grad.double()) < 2e-5, name  # type: ignore[union-attr]


def test_names_and_parameters_are_the_bases_own_and_adapters_can_be_switched_off(tiny_llama):
    plain, tiled = tiny_llama(), adapt(tiny_llama(), "v2")
    names, parameters = list(tiled.state_dict()), dict(tiled.named_parameters())
    tile_layers(tiled, TILES)
    assert list(tiled.state_dict()) == names
    assert all(parameter is parameters[name] for name, parameter in tiled.named_parameters())
    with torch.no_grad(), disable_adapters(tiled):
        actual, expected = (model(input_ids=tokens()).logits for model in (tiled, plain))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_off_leaves_the_model_as_it_is(tiny_llama):
    model = adapt(tiny_llama(), "v1")
    modules = dict(model.named_modules())
    tile_layers(model, MemorySettings())
    assert dict(model.named_modules()) == modules
