"""Schemas, and what is wrong with a record that is of none."""

import json
from pathlib import Path

import pytest

from sparse_llama.data.files import read_file
from sparse_llama.data.prompt import alpaca_prompt
from sparse_llama.data.records import MalformedRecordError, parse_record

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSum up.\n\n### Input:\nA text.\n\n### Response:\n"
)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Sum up.", "context": "A text.", "response": "Text.", "category": "summary"},
        {"instruction": "Sum up.", "input": "A text.", "output": "Text.", "category": "summary"},
    ],
)
def test_dolly_and_alpaca_records_meet_stanfords_template(record: dict):
    example = parse_record(record)
    assert example.prompt == WITH_INPUT
    assert example.response == "Text."
    assert example.category == "summary"


def test_an_empty_or_missing_context_is_none():
    for extra in ({}, {"context": ""}, {"context": None}):
        example = parse_record({"instruction": "Hi", "response": "Hello"} | extra)
        assert "### Input" not in example.prompt
        assert example.category is None


def test_chats_alternate_and_every_answer_is_learned():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ann."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Oslo."},
    ]
    example = parse_record({"messages": messages})
    assert [turn.response for turn in example.turns] == ["Ann.", "Oslo."]
    assert example.turns[0].prompt == "Be brief.\n\n" + alpaca_prompt("Who?")
    assert example.turns[1].prompt == "### Instruction:\nWhere?\n\n### Response:\n"
    shared = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ann."}]
    assert parse_record({"conversations": shared}).prompt == alpaca_prompt("Who?")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "must be an object, got list"),
        ({"question": "?", "answer": "!"}, "columns are answer, question; expected instruction and response"),
        ({"instruction": "Hi", "response": " "}, "response: empty"),
        ({"instruction": "", "response": "Hello"}, "instruction: empty"),
        ({"instruction": "Hi", "response": 4}, "response: must be a string, got int"),
        ({"text": "\udcff"}, "text: not UTF-8 text"),
        ({"messages": []}, "messages: must be a list of messages"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no assistant message to learn from"),
        (
            {"messages": [{"role": "assistant", "content": "Hi"}]},
            "messages[0].role: 'assistant' cannot stand here",
        ),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].role: 'tool' cannot stand here"),
    ],
)
def test_a_record_of_no_schema_says_what_is_wrong(record: object, reason: str):
    with pytest.raises(MalformedRecordError) as caught:
        parse_record(record)
    assert reason in str(caught.value)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "count"), [("dolly-sample.jsonl", 151), ("alpaca-sample.json", 999), ("c4-sample.jsonl", 300)]
)
def test_real_records_are_read(shared: Path, name: str, count: int):
    found = list(read_file(shared / "data" / name))
    assert len(found) == count
    is_answered = [one.example is not None for one in found]
    empty = [one.reason for one in found if one.example is None]
    assert empty == []
    assert all(is_answered)
    if name.startswith("dolly"):
        lines = (shared / "data" / name).read_text(encoding="utf-8").splitlines()
        assert [one.example.response for one in found if one.example] == [
            json.loads(x)["response"] for x in lines
        ]
