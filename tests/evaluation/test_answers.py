"""Answers: what is compared, by category, and the file they are written to."""

import json
from pathlib import Path
from typing import Any

import pytest
from adapted_models import adapt
from oracles.word_tokenizer import WordTokenizer

from sparse_llama.data.records import Example, Turn
from sparse_llama.errors import ConfigError
from sparse_llama.evaluation.answers import (
    Answer,
    answer_records,
    by_category,
    check_answers_file,
    write_answers,
)
from sparse_llama.generation import generate_batch

TOKENIZER: Any = WordTokenizer()
ANSWERS = [
    Answer("Who?\n", "Ann \u00e9.", " Ann \u00e9.\n", "people"),
    Answer("Where?", "in Oslo now", "in Rome now"),
    Answer("When?", "then", ""),
]


def test_answers_are_the_models_own_in_the_records_order(tiny_llama):
    model: Any = adapt(tiny_llama(), "v1")
    prompts = ["w3 w4 w5", "w9", "w4 w3 w5"]
    examples = [
        Example((Turn(prompt, f"w{number}"),), category)
        for number, (prompt, category) in enumerate(zip(prompts, ["a", None, "b"], strict=True))
    ]
    answers = answer_records(model, TOKENIZER, examples, 6)
    assert [answer.text for answer in answers] == generate_batch(model, TOKENIZER, prompts, 6)
    assert [answer.prompt for answer in answers] == prompts
    assert [answer.reference for answer in answers] == ["w0", "w1", "w2"]
    assert [answer.category for answer in answers] == ["a", "all", "b"]


def test_an_answer_is_exact_but_for_white_space_at_its_ends_and_overlaps_in_part():
    assert [answer.exact for answer in ANSWERS] == [True, False, False]
    assert [answer.rouge_l for answer in ANSWERS] == [1.0, pytest.approx(2 / 3), 0.0]


def test_means_are_by_category_and_their_average_is_of_categories():
    assert by_category(ANSWERS, lambda answer: answer.rouge_l) == {
        "average": pytest.approx((1 + 1 / 3) / 2),
        "by_category": {"all": pytest.approx(1 / 3), "people": 1.0},
        "records": 3,
    }


def test_each_line_of_the_file_is_an_answer_with_its_scores(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    write_answers(path, ANSWERS)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert records[0] == {
        "prompt": "Who?\n",
        "reference": "Ann \u00e9.",
        "answer": " Ann \u00e9.\n",
        "category": "people",
        "exact": True,
        "rouge_l": 1.0,
    }
    assert [(record["exact"], record["category"]) for record in records[1:]] == [(False, "all")] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_answers_may_replace_answers_and_an_empty_file(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    check_answers_file("--answers", path)
    path.touch()
    check_answers_file("--answers", path)
    write_answers(path, ANSWERS)
    check_answers_file("--answers", path)


@pytest.mark.parametrize(
    "content",
    [b'{"instruction": "Who?", "response": "Ann."}\n', b"my notes\n", b"3\n", b"\xff\xfe\n", b"[]\n", b"\n"],
)
def test_answers_do_not_replace_anything_else(tmp_path: Path, content: bytes):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"^--answers .*data.jsonl: holds something else than answers.*name"
    ):
        check_answers_file("--answers", path)
    assert path.read_bytes() == content
