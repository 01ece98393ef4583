"""A chat: each answer is what plain transformers writes behind the ids that training has for the conversation
so far."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import shake
from chat_tokenizers import SHORT, write_sentencepiece
from transformers import LlamaForCausalLM

from sparse_llama import cli
from sparse_llama.adapters.attach import attach_adapters
from sparse_llama.cli.chat import Chat, converse
from sparse_llama.config.bundled import MODELS
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.data.encode import encode_turns
from sparse_llama.data.records import parse_record
from sparse_llama.data.template import ChatTokenizer
from sparse_llama.errors import ConfigError
from sparse_llama.model.assemble import OpenedModel, open_model

BASE = MODELS["bundled:tiny-llama"]
QUESTIONS = ["Which color does Pabel like best?", "Where does Velen live?", "Tell me the pet of Nilen."]
LENGTH = 12


@pytest.fixture(params=["alpaca", "tokenizer"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> OpenedModel:
    """The bundled base, with either template."""
    if request.param == "alpaca":
        return open_model(str(BASE))
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    return open_model(str(write_sentencepiece(folder, SHORT)), template="tokenizer")


def answer(chat: Chat, question: str) -> str:
    return "".join(chat.answer(question))


def by_transformers(opened: OpenedModel, messages: list[dict[str, str]]) -> str:
    """Return the greedy answer to a record's last message but one, whose answer is left out."""
    tokenizer = opened.templated
    example = parse_record({"messages": [*messages, {"role": "assistant", "content": "."}]})
    if isinstance(tokenizer, ChatTokenizer):
        example = tokenizer.write_turns(example)
    document = encode_turns(example, tokenizer)
    last = max(place for place, label in enumerate(document.labels) if label == -100)
    ids = torch.tensor([document.ids[: last + 1]])
    plain = LlamaForCausalLM.from_pretrained(opened.folder)
    written = plain.generate(
        ids, max_new_tokens=LENGTH, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=0
    )[0, ids.shape[1] :].tolist()
    kept = written[:-1] if written[-1] == tokenizer.eos_id else written
    before = ids[0].tolist()
    return tokenizer.decode(before + kept)[len(tokenizer.decode(before)) :]


def test_every_answer_follows_the_conversation_as_training_has_it(opened: OpenedModel):
    chat = Chat(opened, max_new_tokens=LENGTH)
    said: list[dict[str, str]] = []
    for question in QUESTIONS:
        said.append({"role": "user", "content": question})
        expected = by_transformers(opened, said)
        assert answer(chat, question) == expected
        assert expected.strip(), "nothing to go on from"
        said.append({"role": "assistant", "content": expected})
    assert [{"role": one.role, "content": one.content} for one in chat.messages] == said


def test_begun_anew_nothing_was_said(opened: OpenedModel):
    chat = Chat(opened, max_new_tokens=LENGTH)
    first = answer(chat, QUESTIONS[0])
    answer(chat, QUESTIONS[1])
    chat.forget()
    assert chat.messages == []
    assert answer(chat, QUESTIONS[0]) == first


@pytest.fixture
def adapted() -> OpenedModel:
    """The bundled base with an adapter that changes what it says."""
    opened = open_model(str(BASE))
    attach_adapters(opened.model, AdapterSettings(version="v2", prompt_length=3, start_layer=1), seed=1)  # type: ignore[arg-type]
    shake(opened.model, 0.05)
    return replace(opened, adapter_file=Any)  # type: ignore[arg-type]


def test_the_adapter_is_switched_off_and_on(adapted: OpenedModel):
    chat, base = Chat(adapted, max_new_tokens=LENGTH), Chat(open_model(str(BASE)), max_new_tokens=LENGTH)
    with_adapter, without = answer(chat, QUESTIONS[0]), answer(base, QUESTIONS[0])
    assert with_adapter != without
    chat.switch(is_adapted=False)
    chat.switch(is_adapted=False)
    assert answer(chat, chat.take_back()) == without
    chat.switch(is_adapted=True)
    assert answer(chat, chat.take_back()) == with_adapter
    assert len(chat.messages) == 2


def test_a_base_has_no_adapter_to_switch():
    chat = Chat(open_model(str(BASE)), max_new_tokens=LENGTH)
    with pytest.raises(ConfigError, match="/adapter: this model has none to switch"):
        chat.switch(is_adapted=True)


def lines(*given: str) -> Iterator[str | None]:
    yield from (*given, None)


def test_the_commands_in_the_terminal(adapted: OpenedModel, capsys: pytest.CaptureFixture[str]):
    chat, alone = Chat(adapted, max_new_tokens=LENGTH), Chat(adapted, max_new_tokens=LENGTH)
    expected = answer(alone, QUESTIONS[0])
    given = lines(
        "/again", QUESTIONS[0], "", "/adapter", "/adapter off", "/adapter", "/adapter on", "/history", "/no",
        "/reset", "/history", "/help", "/exit", "never read",
    )  # fmt: skip
    converse(chat, lambda: next(given))
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "error: /again: nothing was asked yet; ask something first",
        "error: /no: no such command; /help lists them",
    ]
    assert printed.out.startswith(
        f"{expected}\n\n(the adapter is on)\n(the adapter is off)\n(the adapter is off)"
    )
    assert f"user: {QUESTIONS[0]}\nassistant: {expected.strip()}\n(begun anew)\n/reset " in printed.out
    assert chat.messages == []
    assert next(given) == "never read"


def test_an_interrupted_answer_is_kept_as_far_as_it_came(capsys: pytest.CaptureFixture[str]):
    chat = Chat(open_model(str(BASE)), max_new_tokens=LENGTH)
    whole = answer(Chat(open_model(str(BASE)), max_new_tokens=LENGTH), QUESTIONS[0])
    pieces = chat.answer(QUESTIONS[0])
    begun = next(pieces) + next(pieces)
    pieces.close()  # what Ctrl-C comes to
    assert whole.startswith(begun)
    assert chat.messages[-1].content == begun


def test_a_conversation_that_is_too_long_says_so_and_goes_on(capsys: pytest.CaptureFixture[str]):
    chat = Chat(open_model(str(BASE)), max_new_tokens=LENGTH)
    given = lines("color " * 3000, QUESTIONS[0])
    converse(chat, lambda: next(given))
    printed = capsys.readouterr()
    assert "tokens, and 2048 are the max_position_embeddings of the model; /reset begins anew" in printed.err
    assert printed.err.count("\n") == 1
    assert len(chat.messages) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--chat", "--prompt", "Hi"), "--prompt: has no part in --chat"),
        (("--chat", "--raw"), "--raw: has no part in --chat"),
        ((), "--prompt: nothing to answer; give an instruction, or --chat to converse"),
        (("--chat", "--top_k", "3"), "--top_k: has no effect at --temperature 0"),
        (("--chat", "--max_new_tokens", "0"), "--max_new_tokens: must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line(flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.main(cli.generate, cli.generate_parser("doc"), ["--model", str(BASE), *flags])
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1
