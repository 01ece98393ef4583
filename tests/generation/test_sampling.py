"""Sampling: the distribution that a token is drawn from, and what a seed fixes."""

from typing import Any

import pytest
import torch
from adapted_models import adapt
from oracles.word_tokenizer import WordTokenizer
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sparse_llama.errors import ConfigError
from sparse_llama.generation import generate_stream, next_token_probabilities

PROMPT = "w7 w31 w3"
TOKENIZER: Any = WordTokenizer()
NO_IDS: Any = torch.empty(0)  # the warpers look at none


def sample(model, **options: Any) -> str:
    return "".join(generate_stream(model, TOKENIZER, PROMPT, max_new_tokens=20, **options))


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (0, 0.01), (9, 0.5), (1, 0.3)])
def test_the_distribution_is_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(61, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores = TemperatureLogitsWarper(temperature)(NO_IDS, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(NO_IDS, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(NO_IDS, scores)
    found = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(found, scores[0].softmax(-1), rtol=1e-12, atol=1e-15)


def test_tokens_are_drawn_as_often_as_they_are_likely(tiny_llama):
    """600 seeds of one token; 5 standard deviations are exceeded by chance once in two million tokens."""
    model = adapt(tiny_llama(initializer_range=0.1), "v1")
    ids = torch.tensor([[1, *TOKENIZER.encode(PROMPT)]])
    with torch.no_grad():
        expected = (model(input_ids=ids).logits[0, -1].double() / 1.5).softmax(-1)
    expected[[TOKENIZER.bos_id, TOKENIZER.eos_id]] = 0.0  # drawn too, but not text
    counts = torch.zeros(61)
    for seed in range(600):
        for piece in generate_stream(model, TOKENIZER, PROMPT, max_new_tokens=1, temperature=1.5, seed=seed):
            counts[TOKENIZER.encode(piece)[0]] += 1
    deviation = (counts - 600 * expected).abs() / (600 * expected * (1 - expected)).sqrt().clamp(min=1)
    assert deviation.max() < 5
    assert (counts > 10).sum() > 5


def test_a_seed_repeats_and_another_does_not(tiny_llama):
    model = adapt(tiny_llama(), "v1")
    first = sample(model, temperature=1.5, seed=1)
    torch.manual_seed(123)  # the draws have a generator of their own
    assert sample(model, temperature=1.5, seed=1) == first
    assert sample(model, temperature=1.5, seed=2) != first


def test_sampling_leaves_the_global_generator_alone(tiny_llama):
    before = torch.get_rng_state()
    sample(adapt(tiny_llama(), "v1"), temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}])
def test_the_narrowest_choice_is_greedy(tiny_llama, options):
    model = adapt(tiny_llama(), "v1")
    assert sample(model, **{"temperature": 2.0} | options) == sample(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "--temperature: must be 0 .* or above, got -0.1"),
        ({"temperature": float("nan")}, "--temperature: .* got nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top_p: must be above 0 and at most 1, got 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "--top_p: must be above 0 and at most 1, got 1.1"),
        ({"temperature": 1.0, "top_k": -1}, "--top_k: must be 0 .* or above, got -1"),
        ({"top_k": 3}, "--top_k: has no effect at --temperature 0"),
        ({"top_p": 0.5}, "--top_p: has no effect at --temperature 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens: must be at least 1, got 0"),
    ],
)
def test_values_that_mean_nothing_are_refused_before_the_first_token(tiny_llama, options, message):
    with pytest.raises(ConfigError, match=message):
        generate_stream(tiny_llama(), TOKENIZER, PROMPT, **{"max_new_tokens": 3} | options)
