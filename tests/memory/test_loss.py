"""The tiled loss: plain autograd's value and gradients, whatever it is multiplied by, and memory of one tile.

``V`` vocabulary, ``C`` model width.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapted_models import adapt, shifted, tokens
from allocated import peak_bytes
from saved_tensors import kept_for_backward
from torch import nn

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.adapters.scale_bias import ScaleBiasLinear
from sparse_llama.config.settings import MemorySettings
from sparse_llama.memory.loss import TiledHeadLoss
from sparse_llama.memory.tiles import tile_layers
from sparse_llama.model.objective import TokenLoss

VOCABULARY, WIDTH, TOKENS = 50, 12, 40
PARTS = {"none": None, "both": (True, True), "scale": (True, False), "bias": (False, True)}
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_head(
    parts: str = "both", dtype: torch.dtype = torch.float64, *, has_bias: bool = False
) -> nn.Linear:
    base = nn.Linear(WIDTH, VOCABULARY, bias=has_bias, dtype=dtype).requires_grad_(False)
    base.weight.copy_(random(VOCABULARY, WIDTH, seed=0))
    if has_bias:
        base.bias.copy_(random(VOCABULARY, seed=1))
    wanted = PARTS[parts]
    if wanted is None:
        return base
    head = ScaleBiasLinear(base, becomes="logits")
    for seed, (kind, parameter) in enumerate(head.new_parameters(*wanted).items()):
        setattr(head, kind, parameter)
        parameter.data = random(VOCABULARY, seed=2 + seed).to(dtype)
    return head


def rows_and_labels(num_labelled: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    rows = torch.randperm(TOKENS, generator=generator)[:num_labelled].sort().values
    return rows, torch.randint(VOCABULARY, (num_labelled,), generator=generator)


def formula(
    head: nn.Linear, hidden: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed cross entropy by plain fp64 autograd, and the leaves that train."""
    leaves = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in head.named_parameters()
        if parameter.requires_grad
    }
    logits = F.linear(hidden[rows], head.weight.double(), None if head.bias is None else head.bias.double())
    logits = (logits + leaves.get("adapter_bias", 0.0)) * leaves.get("adapter_scale", 1.0)
    return F.cross_entropy(logits, labels, reduction="sum"), leaves


def relative_error(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert actual is not None
    assert expected is not None
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


def check(head: nn.Linear, num_labelled: int, tile: int, factor: float, tolerance: float) -> None:
    dtype = head.weight.dtype
    hidden = random(TOKENS, WIDTH, seed=8, dtype=dtype).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    rows, labels = rows_and_labels(num_labelled)
    loss, (expected, leaves) = (
        TiledHeadLoss(head, tile)(hidden, rows, labels),
        formula(head, exact, rows, labels),
    )
    assert loss.dim() == 0
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(loss, expected) < tolerance
    (loss * factor).backward()
    (expected * factor).backward()
    assert relative_error(hidden.grad, exact.grad) < tolerance
    for name, leaf in leaves.items():
        assert relative_error(head.get_parameter(name).grad, leaf.grad) < tolerance, name
    with torch.no_grad():
        assert torch.equal(TiledHeadLoss(head, tile)(hidden, rows, labels), loss)


@pytest.mark.parametrize("factor", [1.0, -0.25, 3e-4])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("parts", PARTS)
def test_value_and_gradients_are_the_formulas_whatever_the_loss_is_multiplied_by(parts, has_bias, factor):
    """Memory trap 9: DeepSpeed's multiplies the hidden states' gradient and forgets the parameters'."""
    check(make_head(parts, has_bias=has_bias), 23, 7, factor, ROUNDING[torch.float64])


@pytest.mark.parametrize("num_labelled", [1, 7, 40])
def test_any_tile_will_do(num_labelled):
    """Memory traps 10 and 12: unequal tiles, longer than everything, one row."""
    for tile in (1, 2, 3, 6, 7, 8, 40, 1000):
        check(make_head(), num_labelled, tile, 0.25, ROUNDING[torch.float64])


# the factors are what a step's are: one over a count, which 16 bits cannot hold
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", ["none", "both"])
def test_in_fewer_bits_it_is_as_near_to_the_formula_as_rounding_allows(parts, dtype):
    check(make_head(parts, dtype), 40, 7, 1 / 12, ROUNDING[dtype])


def test_a_factor_is_not_rounded_to_16_bits():
    """1 / 12 in bf16 is 0.2% too large, which would bend every gradient of a step the same way."""
    grads = []
    for factor in (1.0, 1 / 12):
        hidden = random(TOKENS, WIDTH, seed=8, dtype=torch.bfloat16).requires_grad_()
        head = make_head("both", torch.bfloat16)
        (TiledHeadLoss(head, 7)(hidden, *rows_and_labels(TOKENS)) * factor).backward()
        assert hidden.grad is not None
        grads.append(hidden.grad.double())
    ratio = (grads[0] * grads[1]).sum() / grads[0].square().sum()
    assert float(ratio) == pytest.approx(1 / 12, rel=3e-4)


@pytest.mark.parametrize("parts", PARTS)
def test_without_a_labelled_row_everything_is_zero_and_nothing_is_missing(parts):
    """Memory trap 11."""
    head, hidden = make_head(parts), random(TOKENS, WIDTH, seed=8).requires_grad_()
    loss = TiledHeadLoss(head, 7)(hidden, *rows_and_labels(0))
    assert loss.item() == 0.0
    (loss * 0.25).backward()
    for leaf in (hidden, *(parameter for _, parameter in trainable_parameters(head))):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_hidden_states_that_need_no_gradient_get_none_and_the_head_does():
    head, hidden = make_head(), random(TOKENS, WIDTH, seed=8)
    rows, labels = rows_and_labels(23)
    TiledHeadLoss(head, 7)(hidden, rows, labels).backward()
    expected, leaves = formula(head, hidden, rows, labels)
    expected.backward()
    for name, leaf in leaves.items():
        assert relative_error(head.get_parameter(name).grad, leaf.grad) < 1e-12, name


def test_it_may_be_gone_through_twice():
    head, hidden = make_head(), random(TOKENS, WIDTH, seed=8).requires_grad_()
    loss = TiledHeadLoss(head, 7)(hidden, *rows_and_labels(23))
    leaves = [hidden, *(parameter for _, parameter in trainable_parameters(head))]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    half = torch.autograd.grad(loss * 0.5, leaves)
    for first, second in zip(once, half, strict=True):
        torch.testing.assert_close(first / 2, second, rtol=1e-14, atol=0)


def test_logits_beyond_the_exponents_range_have_a_finite_loss():
    head = make_head("none")
    head.weight.data *= 1e4
    check(head, 23, 7, 1.0, ROUNDING[torch.float64])


def test_a_thousand_tiles_sum_as_one():
    """Memory trap 8."""
    rows, labels = torch.arange(1000), torch.arange(1000) % VOCABULARY
    grads = []
    for tile in (1, 1000):
        head, hidden = make_head(dtype=torch.float32), random(1000, WIDTH, seed=8, dtype=torch.float32)
        TiledHeadLoss(head, tile)(hidden, rows, labels).backward()
        grads.append([parameter.grad for _, parameter in trainable_parameters(head)])
    for many, one in zip(*grads, strict=True):
        assert many is not None
        assert one is not None
        assert relative_error(many, one.double()) < 1e-6


def test_a_softmax_over_many_words_keeps_its_small_gradients_in_fp16():
    """Where the right word has 0.998, each of 60,000 others has 3e-8, which fp16 does not hold; together they
    are as much of the gradient as the right one."""
    head = nn.Linear(4, 60_000, bias=False, dtype=torch.float16).requires_grad_(False)
    head.weight.copy_(1 + 0.1 * random(60_000, 4, seed=0))
    head.weight[7] = 9.6
    hidden = torch.full((3, 4), 0.5, dtype=torch.float16).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    rows, labels = torch.arange(3), torch.tensor([7, 7, 7])
    TiledHeadLoss(head, 2)(hidden, rows, labels).backward()
    logits = F.linear(exact, head.weight.double())
    assert 0.99 < float(logits.detach().softmax(-1)[0, 7]) < 0.999
    F.cross_entropy(logits, labels, reduction="sum").backward()
    assert relative_error(hidden.grad, exact.grad) < 5e-3


def test_nothing_is_kept_but_gradients_of_labelled_rows_and_which_they_are():
    head, hidden = make_head(), random(TOKENS, WIDTH, seed=8).requires_grad_()
    rows, labels = rows_and_labels(23)
    kept = kept_for_backward(lambda: TiledHeadLoss(head, 7)(hidden, rows, labels), head)
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(23,), (23, WIDTH)]


def test_logits_exist_a_tile_at_a_time():
    """Untiled: fp32 logits, their softmax and its gradient, beside 16 bits of both."""
    vocabulary, width, num_tokens, tile = 4000, 16, 1024, 64
    head = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    scaled = ScaleBiasLinear(head, becomes="logits")
    for kind, parameter in scaled.new_parameters(True, True).items():
        setattr(scaled, kind, parameter)
    hidden = random(num_tokens, width, seed=1, dtype=torch.bfloat16).requires_grad_()
    rows, labels = torch.arange(num_tokens), torch.arange(num_tokens) % vocabulary
    fp32_slices = 3 * 4 * (1 << 20)  # what sums of fp32 products are made of, whatever the size
    for module, least, most in (
        (lambda: F.cross_entropy(scaled(hidden).float(), labels, reduction="sum"), 10 * num_tokens, None),
        (lambda: TiledHeadLoss(scaled, tile)(hidden, rows, labels), 6 * tile, 12 * tile),
    ):
        peak = peak_bytes(lambda module=module: module().backward()) / vocabulary
        assert peak > least
        assert most is None or peak < most + fp32_slices / vocabulary


@pytest.mark.parametrize("num_labelled", [0, 1, 5, 18])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_model_trains_by_the_tiled_loss_as_by_the_untiled(tiny_llama, version, num_labelled):
    ids = tokens()
    labels = ids.masked_fill(torch.arange(18).view(2, 9) >= num_labelled, -100)
    batch = (ids, torch.arange(9).expand(2, 9), shifted(labels))
    losses, gradients = [], []
    for loss_tile in (None, 4):
        model = adapt(tiny_llama().double(), version).train()
        loss = TokenLoss(model, loss_tile=loss_tile)(*batch)
        (loss * 0.125).backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad for name, parameter in trainable_parameters(model)})
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for name, expected in gradients[0].items():
        # transformers' norms round what goes on from here to fp32
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-6)


def test_no_name_and_no_parameter_is_added(tiny_llama):
    """A checkpoint of a run without tiles fits one with them."""
    model: Any = adapt(tiny_llama(), "v2")
    tile_layers(model, MemorySettings(mlp_tile=5, norm_tile=7))
    plain, tiled = TokenLoss(model), TokenLoss(model, loss_tile=4)
    assert list(tiled.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in tiled.named_parameters()] == [name for name, _ in plain.named_parameters()]
