"""A base that was never loaded is refused; one that works is not."""

import math

import pytest
import torch
from adapted_models import tokens

from sparse_llama.errors import ModelError
from sparse_llama.model.checks import check_first_loss, check_logits, check_perplexity


def test_a_model_with_a_zeroed_head_is_refused(tiny_llama):
    """T2, T3: the report's 32000.07 is the perplexity of exactly constant logits."""
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    with pytest.raises(ModelError, match=r"tiny: constant logits .* weights were most likely not loaded"):
        check_logits(model(input_ids=tokens()).logits, source="tiny")


def test_constant_logits_other_than_zero_are_refused():
    with pytest.raises(ModelError, match="constant logits"):
        check_logits(torch.full((2, 3, 50), 7.25), source="tiny")


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(ModelError, match="not finite"):
        check_logits(torch.tensor([[1.0, math.nan, 2.0]]), source="tiny")


def test_a_model_with_weights_passes(tiny_llama):
    check_logits(tiny_llama()(input_ids=tokens()).logits, source="tiny")
    check_logits(tiny_llama().bfloat16()(input_ids=tokens()).logits, source="tiny")


@pytest.mark.parametrize("loss", [0.91 * math.log(32000), math.log(32000), math.nan, math.inf])
def test_a_first_loss_of_guessing_is_refused(loss):
    """T2."""
    with pytest.raises(ModelError, match=r"above 0.9 ln V = 9.336, where guessing gives 10.373"):
        check_first_loss(loss, vocab_size=32000, source="tiny")


def test_a_plausible_first_loss_passes():
    check_first_loss(0.89 * math.log(32000), vocab_size=32000, source="tiny")


def test_random_weights_are_not_checked():
    check_logits(torch.zeros(1, 2, 5), source="tiny", random_weights=True)
    check_first_loss(99.0, vocab_size=5, source="tiny", random_weights=True)


@pytest.mark.parametrize("loss", [math.log(31000), math.log(32000), math.log(32000) + 1.6])
def test_a_perplexity_near_the_vocabulary_is_a_broken_run(loss):
    """Random weights of 70B's width score ln V + 1.6: half of (0.02 ** 2) * 8,192."""
    message = r"tiny: a perplexity of [\d,]+ over 5,000 tokens, .* 32,000: a broken run, .* not loaded"
    with pytest.raises(ModelError, match=message):
        check_perplexity(loss, num_tokens=5000, vocab_size=32000, source="tiny")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_perplexity_that_is_no_number_is_a_broken_run(loss):
    with pytest.raises(ModelError, match=r"a perplexity of (nan|inf) over 3 tokens"):
        check_perplexity(loss, num_tokens=3, vocab_size=32000, source="tiny")


def test_a_trained_model_passes_and_so_does_one_that_is_surely_wrong_or_measured_on_few_tokens():
    check_perplexity(1.6, num_tokens=5000, vocab_size=32000, source="tiny")
    check_perplexity(14.9, num_tokens=5000, vocab_size=1344, source="tiny")  # bundled:tiny-llama on C4
    check_perplexity(5.51, num_tokens=5000, vocab_size=512, source="tiny")  # stories260K on WikiText-2
    check_perplexity(math.log(32000), num_tokens=20, vocab_size=32000, source="tiny")
