"""Exact match: whole answers, by category, each category weighing the same."""

from typing import Any

import pytest
from adapted_models import adapt
from oracles.word_tokenizer import WordTokenizer

from sparse_llama.data.records import Example, Turn
from sparse_llama.evaluation.exact_match import exact_match, spread
from sparse_llama.generation import generate_batch

TOKENIZER: Any = WordTokenizer()
PROMPTS = ["w3 w4 w5", "w9", "w4 w3 w5", "w8 w8"]


@pytest.fixture
def model(tiny_llama) -> Any:
    return adapt(tiny_llama(), "v1")


@pytest.fixture
def answers(model) -> list[str]:
    """What the model says; the tests below know which of it they put into the records."""
    return generate_batch(model, TOKENIZER, PROMPTS, 6)


def match(model: Any, responses: list[str], categories: list[str | None]) -> dict[str, Any]:
    examples = [
        Example((Turn(prompt, response),), category)
        for prompt, response, category in zip(PROMPTS, responses, categories, strict=True)
    ]
    return exact_match(model, TOKENIZER, examples, 6)


def test_categories_weigh_the_same_whatever_their_size(model, answers):
    found = match(model, [answers[0], "w1", "w1", answers[3]], ["a", "a", "a", "b"])
    assert found["by_category"] == {"a": pytest.approx(1 / 3), "b": 1.0}
    assert found["average"] == pytest.approx(2 / 3)
    assert found["records"] == 4


def test_white_space_around_an_answer_does_not_count_and_within_it_does(model, answers):
    assert answers[0].startswith(" ")
    assert len(answers[1].split()) > 1
    found = match(
        model,
        [f"\n{answers[0].strip()}  ", answers[1].replace(" w", "  w"), answers[2], answers[3]],
        ["around", "within", "as is", "as is"],
    )
    assert found["by_category"] == {"around": 1.0, "as is": 1.0, "within": 0.0}


def test_an_answer_that_only_begins_right_is_wrong(model, answers):
    shorter = [answer.rsplit(" ", 1)[0] for answer in answers]
    longer = [f"{answer} w9" for answer in answers]
    assert match(model, shorter, [None] * 4)["average"] == 0.0
    assert match(model, longer, [None] * 4)["average"] == 0.0


def test_records_without_a_category_are_one(model, answers):
    assert match(model, answers, [None] * 4) == {"average": 1.0, "by_category": {"all": 1.0}, "records": 4}


@pytest.mark.parametrize("count", [3, 30, 60, 90, 179])
def test_a_few_records_of_all_kinds_are_asked_wherever_the_kinds_stand(count):
    """Every 60th record of categories that take turns is of one category; the first third of a sorted file
    is, too."""
    in_turns = [Example((Turn("?", str(number)),), "abc"[number % 3]) for number in range(180)]
    in_order = [Example((Turn("?", str(number)),), "abc"[number // 60]) for number in range(180)]
    for examples in (in_turns, in_order):
        chosen = spread(examples, count)
        numbers = [int(example.response) for example in chosen]
        assert numbers == sorted(set(numbers))
        assert len(chosen) == count
        assert chosen == spread(examples, count)
        if count > 3:
            shares = [sum(example.category == name for example in chosen) / count for name in "abc"]
            assert min(shares) > 1 / 6  # half of an equal share
    assert spread(in_turns, 180) == spread(in_turns, 500) == in_turns
