"""The gradient check goes green where gradients are right, and red at any mistake that is planted."""

import dataclasses

import pytest
import torch
from oracles import adapter_formula
from oracles.masked_attention import token_table

from sparse_llama.adapters import norm, zero_init
from sparse_llama.adapters.linear_parts import ScaleBiasSums
from sparse_llama.attention import blockwise
from sparse_llama.doctor import gradients, plain_llama
from sparse_llama.doctor.checks import PATHS
from sparse_llama.doctor.gradients import ATTENTION, VARIANTS, check_gradients, compare
from sparse_llama.doctor.small_llama import (
    DOCUMENTS,
    NUM_TOKENS,
    build_small_llama,
    draw_batch,
    position_ids,
    visible,
)
from sparse_llama.layouts import Layout

COVERING = (ATTENTION, "tiled loss", "all of them, v1", "all of them, v2")
"""Between them every path; the others tell which one is wrong."""


def test_every_path_is_checked():
    assert (ATTENTION, *VARIANTS) == PATHS


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in COVERING else pytest.mark.slow) for name in PATHS]
)
def test_the_paths_of_this_machine_are_right(name: str):
    found = check_gradients(name)
    assert found.status == "ok", found
    assert "in fp64" in found.found
    assert ("by differences" in found.found) == (name != ATTENTION)


def test_the_formulas_are_those_of_the_tests():
    """Written independently, in fp64 with their own rotation, which transformers has in fp32."""
    objective = build_small_llama(VARIANTS["adapter v2"], torch.float64)
    batch = draw_batch(objective)
    row = plain_llama.Batch(*(getattr(batch, one.name)[:1] for one in dataclasses.fields(batch)))
    weights = {name: one.detach() for name, one in objective.llama.named_parameters()}
    config = objective.llama.config
    logits = adapter_formula.adapted_logits(
        weights, config, row.input_ids, row.position_ids, table=row.sees[0]
    )
    losses = -logits.log_softmax(-1).gather(-1, row.labels.clamp(min=0)[..., None])[..., 0]
    expected = float(losses[row.labels >= 0].sum())
    assert float(plain_llama.summed_loss(weights, config, row)) == pytest.approx(expected, rel=1e-6)


def test_who_sees_whom_is_the_layouts_answer():
    layout = made_layout()
    sees = visible(layout)
    assert len(DOCUMENTS) == 2
    assert torch.equal(sees[0], token_table(layout, 4, NUM_TOKENS))
    first = DOCUMENTS[1][0]
    assert torch.equal(sees[1, :, :first, :first], token_table(layout, 4, first))
    second = token_table(layout, 4, NUM_TOKENS - first)
    assert torch.equal(sees[1, :, first:, first:], second)
    assert not sees[1, :, first:, :first].any()
    assert 0.2 < sees[0].sum() / (4 * NUM_TOKENS * (NUM_TOKENS + 1) / 2) < 0.7  # neither empty nor full
    assert position_ids().shape == (2, NUM_TOKENS)


def made_layout() -> Layout:
    objective = build_small_llama(VARIANTS["adapter v1"], torch.float64)
    plan = objective.llama.model.layers[0].self_attn.attention_plan
    return plan.layout(0, NUM_TOKENS)  # type: ignore[union-attr]


def without_delta(backward):
    """A backward pass of attention that forgets rowsum(do * o), for which ATen asks the output."""

    def planted(grad, query, keys, values, output, lse, mask, scaling):
        return backward(grad, query, keys, values, torch.zeros_like(output), lse, mask, scaling)

    return planted


def in_one_part_of_a_thousand(forward):
    def planted(*arguments, **options):
        output, lse = forward(*arguments, **options)
        return output * 1.0001, lse

    return planted


def test_a_term_that_is_missing_in_the_attentions_backward_pass_is_red(monkeypatch):
    monkeypatch.setattr(blockwise, "masked_backward", without_delta(blockwise.masked_backward))
    for name in (ATTENTION, "adapter v1"):
        found = check_gradients(name)
        assert found.status == "fail", name
        assert "do not train here" in found.advice
    assert "is off by" in found.found


def test_a_forward_pass_that_is_wrong_along_with_its_backward_pass_is_red(monkeypatch):
    """Differences of the loss would agree with such gradients; the formulas do not."""
    wrong = in_one_part_of_a_thousand(blockwise.masked_forward)
    monkeypatch.setattr(blockwise, "masked_forward", wrong)
    assert check_gradients(ATTENTION).status == "fail"


def test_a_prompts_gate_without_its_gradient_is_red(monkeypatch):
    right = zero_init.prompt_gradients

    def planted(*arguments, **options):
        found = right(*arguments, **options)
        return found._replace(gate=found.gate * 0.5)

    monkeypatch.setattr(zero_init, "prompt_gradients", planted)
    found = check_gradients("adapter v1")
    assert found.status == "fail"
    assert "zero_init.gate is off by 5e-01" in found.found


def test_a_norm_that_is_differentiated_as_a_product_is_red(monkeypatch):
    def planted(normed, grad, output, weight_sum):
        """Leaves out that the norm itself depends on its input."""
        normalised, inverse = norm._normalised(normed.hidden, normed.epsilon)
        if weight_sum is not None:
            weight_sum += (grad * normalised).sum(0)
        if output is not None:
            output.copy_(grad * normed.weight * inverse)

    monkeypatch.setattr(norm, "norm_gradients", planted)
    assert check_gradients("adapter v2").status == "fail"


def test_a_tiled_loss_that_forgets_its_factor_is_red(monkeypatch):
    """As DeepSpeed's does: right until the loss is scaled, or gradients are accumulated."""
    right = ScaleBiasSums.gradients

    def planted(self, factor):
        return right(self, torch.ones_like(factor))

    monkeypatch.setattr(ScaleBiasSums, "gradients", planted)
    found = check_gradients("tiled loss")
    assert found.status == "fail"
    assert "lm_head" in found.found


def test_what_is_no_number_is_red(monkeypatch):
    def planted(*arguments):
        grads = right(*arguments)
        return grads[0] * float("nan"), *grads[1:]

    right = blockwise.masked_backward
    monkeypatch.setattr(blockwise, "masked_backward", planted)
    assert check_gradients(ATTENTION).status == "fail"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_coarser_format_an_exact_kernel_is_within_what_rounding_costs(monkeypatch, dtype):
    """As on a GPU, whose kernels have no fp64; here with the CPU's, in the GPU's formats."""
    monkeypatch.setattr(gradients, "formats", lambda: (dtype,))
    for name in (ATTENTION, "adapter v1"):
        assert check_gradients(name).status == "ok", name
    monkeypatch.setattr(blockwise, "masked_backward", without_delta(blockwise.masked_backward))
    for name in (ATTENTION, "adapter v1"):
        assert check_gradients(name).status == "fail", name


def test_the_bound_is_a_multiple_of_what_the_plain_evaluation_is_off():
    exact = {"a": torch.ones(4, dtype=torch.float64), "b": torch.full((400,), 2.0, dtype=torch.float64)}
    plain = {"a": exact["a"] * 1.01, "b": exact["b"] * 1.001}
    found = {"a": exact["a"] * 1.029, "b": exact["b"]}
    within, beyond = compare(found, exact, plain, 3.0), compare(found, exact, plain, 2.0)
    assert (within.name, beyond.name) == ("a", "a")
    assert within.error == pytest.approx(0.029)
    assert (within.bound, beyond.bound) == (pytest.approx(0.03), pytest.approx(0.02))
    assert within.is_within
    assert not beyond.is_within
