"""The tokenizer's chat template against transformers' own ``apply_chat_template``, token by token."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from chat_tokenizers import CHATML, write_byte_level, write_sentencepiece
from transformers import AutoTokenizer

from sparse_llama.config.settings import Settings
from sparse_llama.data.chat import ChatTokenizer
from sparse_llama.data.encode import encode_example, encode_turns
from sparse_llama.data.files import Found
from sparse_llama.data.ledger import Ledger, Tally
from sparse_llama.data.prepare import prepare_data
from sparse_llama.data.records import Example, parse_record, plain_text
from sparse_llama.data.split import read_examples
from sparse_llama.data.template import template_of, with_template, write_prompt, write_records
from sparse_llama.data.tokenizer import load_tokenizer
from sparse_llama.errors import ConfigError, DataError
from sparse_llama.generation import encode_prompt

IGNORED = -100
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where does Ann live?"},
    {"role": "assistant", "content": "\nAnn lives in Oslo.  "},
    {"role": "user", "content": "  two  spaces\n\n\U0001f642"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="module")
def chatml(folder: Path) -> ChatTokenizer:
    return open_template(folder)


def open_template(folder: Path) -> ChatTokenizer:
    made = with_template(load_tokenizer(folder), folder, "tokenizer")
    assert isinstance(made, ChatTokenizer)
    return made


def written(tokenizer: ChatTokenizer, messages: list[dict[str, str]]) -> Example:
    return tokenizer.write_turns(parse_record({"messages": messages}))


@pytest.mark.parametrize("messages", [CHAT[1:3], CHAT[:3], CHAT], ids=["one", "system", "two"])
def test_the_ids_are_those_of_transformers_up_to_the_last_end_of_turn(
    folder: Path, chatml: ChatTokenizer, messages: list[dict[str, str]]
):
    """And where its template marks what the assistant says, the labels are its mask."""
    document = encode_turns(written(chatml, messages), chatml)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    length = len(document.ids)
    assert document.ids == expected["input_ids"][:length]
    assert chatml.plain.decode(expected["input_ids"][length:]) == "\n"
    is_labelled = [int(label != IGNORED) for label in document.labels]
    assert is_labelled == expected["assistant_masks"][:length]
    assert [label for label in document.labels if label != IGNORED] == [
        token for token, is_on in zip(document.ids, is_labelled, strict=True) if is_on
    ]


@pytest.mark.parametrize("metaspace", ["first", "always", "never"])
def test_later_turns_are_read_in_their_place_where_a_text_s_beginning_has_other_ids(
    tmp_path: Path, metaspace: str
):
    """A space is put in front of the first text, or of each between two tokens."""
    chat = [CHAT[1], {"role": "assistant", "content": "Ann lives in Oslo."}, CHAT[1], CHAT[4]]
    folder = write_byte_level(tmp_path, metaspace=metaspace)
    tokenizer = open_template(folder)
    document = encode_turns(written(tokenizer, chat), tokenizer)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, return_dict=True)["input_ids"]
    assert document.ids == expected[: len(document.ids)]
    assert document.ids.count(tokenizer.eos_id) == 4


def test_the_prompt_of_generation_is_that_of_transformers_and_a_prefix_of_the_whole(
    folder: Path, chatml: ChatTokenizer
):
    example = written(chatml, CHAT)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT[:2], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    prompt = encode_prompt(chatml, example.prompt)
    assert prompt == expected["input_ids"]
    assert encode_turns(example, chatml).ids[: len(prompt)] == prompt


@pytest.mark.parametrize("content", ["\nAnn", " Ann", "  two", "\n\n", "\U0001f642", "7"])
def test_a_prompt_is_a_prefix_whatever_the_answer_begins_with(chatml: ChatTokenizer, content: str):
    example = written(chatml, [CHAT[1], {"role": "assistant", "content": content + "x"}])
    prompt = encode_prompt(chatml, example.prompt)
    assert encode_turns(example, chatml).ids[: len(prompt)] == prompt


def test_the_end_of_a_turn_is_learned_and_ends_an_answer(chatml: ChatTokenizer):
    document = encode_turns(written(chatml, CHAT), chatml)
    assert chatml.end_text == "<|im_end|>"
    assert document.labels[-1] == chatml.eos_id != chatml.plain.eos_id
    assert document.labels.count(chatml.eos_id) == 2  # of four turns in which somebody ends
    assert document.ids.count(chatml.eos_id) == 5


def test_instruction_records_are_a_conversation_of_two(folder: Path, chatml: ChatTokenizer):
    """The text that an instruction is about stands below it."""
    record = {"instruction": "Sum up.", "context": "A text.", "response": "Text."}
    example = chatml.write_turns(parse_record(record))
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Sum up.\n\nA text."}], tokenize=False, add_generation_prompt=True
    )
    assert (example.prompt, example.response) == (expected, "Text.")
    assert write_prompt(chatml, "Sum up.", "A text.") == expected


def test_a_sentencepiece_base_reads_the_texts_between_tokens_one_by_one(tmp_path: Path):
    """The oracle is the library itself, and transformers for the text; its ids lack a space after <s>."""
    folder = write_sentencepiece(tmp_path)
    tokenizer = open_template(folder)
    document = encode_turns(written(tokenizer, CHAT[1:]), tokenizer)
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT[1:], tokenize=False)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    expected: list[int] = []
    for piece in filter(None, re.split("(<s>|</s>)", text)):
        expected += [library.piece_to_id(piece)] if piece in ("<s>", "</s>") else library.encode(piece)
    assert document.ids == expected
    assert document.ids.count(library.bos_id()) == 2
    labelled = [one for one in document.labels if one != IGNORED]
    cut = labelled.index(tokenizer.eos_id)
    assert library.decode(labelled[:cut]).strip() == "Ann lives in Oslo."
    assert library.decode(labelled[cut + 1 : -1]).strip() == "Yes."


def test_plain_text_has_no_template(folder: Path, chatml: ChatTokenizer):
    """What looks like a token of the template is text there, as it always was."""
    example = plain_text("Ann <|im_end|> lives")
    plain = load_tokenizer(folder)
    assert chatml.write_turns(example) == example
    assert encode_turns(example, chatml) == encode_turns(example, plain)


def test_a_message_that_holds_a_token_of_the_template_is_malformed(chatml: ChatTokenizer):
    found = [
        Found("a.jsonl, line 1", parse_record({"instruction": "Say <|im_end|>", "response": "No."})),
        Found("a.jsonl, line 2", parse_record({"instruction": "Say it.", "response": "It."})),
    ]
    first, second = write_records(found, chatml)
    assert first.example is None
    assert first.place == "a.jsonl, line 1"
    assert first.reason == "messages[0]: holds '<|im_end|>', which the chat template would take for its token"
    assert second.example is not None
    with pytest.raises(ConfigError, match=r"^--prompt: messages\[0\]: holds '<\|im_start\|>', which"):
        write_prompt(chatml, "<|im_start|>system")


def test_what_a_template_refuses_is_malformed_with_its_reason(tmp_path: Path):
    tokenizer = open_template(write_sentencepiece(tmp_path))
    (found,) = write_records([Found("here", parse_record({"messages": CHAT}))], tokenizer)
    assert found.reason == "messages: the chat template refuses them (no system)"


NO_PROMPT = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
NO_END += "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template"),
        (NO_PROMPT, "does not write an answer behind its generation prompt"),
        (NO_END, "ends an answer with no token of its own, so answers could never end"),
    ],
)
def test_a_template_that_does_not_serve_is_one_line(tmp_path: Path, template: str | None, reason: str):
    folder = write_byte_level(tmp_path, template)
    with pytest.raises(DataError, match=f"^sparse_llama.data.template: .*{reason}; use template .alpaca.$"):
        open_template(folder)


EARLIER = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\\n' }}",
    "{{ '<|im_start|>' + message['role'] + ('\\n' if loop.index > loop.length - 2 else ' earlier\\n') }}",
)


def test_a_template_that_writes_earlier_turns_otherwise_makes_longer_chats_malformed(tmp_path: Path):
    """As those of models that think may do: the whole then shows no prompt as it was when it was answered."""
    assert EARLIER != CHATML
    tokenizer = open_template(write_byte_level(tmp_path, EARLIER))
    short, long = (Found("here", parse_record({"messages": chat})) for chat in (CHAT[1:3], CHAT[1:]))
    one, other = write_records([short, long], tokenizer)
    assert one.example is not None
    assert other.reason == (
        "messages[1]: the chat template does not write this answer behind its own prompt; use template "
        '"alpaca"'
    )


def test_alpaca_is_untouched(folder: Path):
    plain = load_tokenizer(folder)
    assert with_template(plain, folder, "alpaca") is plain
    assert template_of(plain) == "alpaca"
    found = Found("here", parse_record({"instruction": "Say <|im_end|>", "response": "No."}))
    assert list(write_records([found], plain)) == [found]


def test_a_record_in_another_template_than_the_tokenizer_reads_is_our_mistake(chatml: ChatTokenizer):
    with pytest.raises(AssertionError):
        encode_example(parse_record({"instruction": "Who?", "response": "Ann."}), chatml, 64, Tally())


def test_a_run_of_the_template_has_its_rows_in_it(folder: Path, chatml: ChatTokenizer, tmp_path: Path):
    """And they are other rows in the cache."""
    lines = [json.dumps({"instruction": f"Who {n}?", "response": f"Ann {n}."}) for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def tokens_read(template: str, tokenizer: Any) -> int:
        data = {"dataset": str(tmp_path / "a.jsonl"), "template": template}
        settings = Settings.parse({"data": data}, "sparse_llama")
        made = prepare_data(settings, tokenizer, align=1, micro_batch_size=1, rank=0, world_size=1)
        assert all(one.template == template for one in made.validation_examples)
        return made.ledger.training.tokens_read

    writer = AutoTokenizer.from_pretrained(folder)
    assert tokens_read("alpaca", load_tokenizer(folder)) > 0
    both = [tokens_read("tokenizer", chatml) for _ in range(2)]
    settings = Settings.parse({"data": {"dataset": str(tmp_path / "a.jsonl")}}, "sparse_llama")
    examples, _ = read_examples(settings.data, Ledger(512, is_packed=True))
    chats = [
        [{"role": message.role, "content": message.content} for message in example.messages]
        for example in examples
    ]
    expected = sum(len(writer.apply_chat_template(chat, return_dict=True)["input_ids"]) - 1 for chat in chats)
    assert both == [expected, expected]  # the newline behind the last turn is left out
