"""What is shown of a row is what is in it: nothing left out, nothing twice, the right part marked."""

from pathlib import Path

import pytest
from chat_tokenizers import write_byte_level

from sparse_llama.data.batches import Batch, collate
from sparse_llama.data.encode import encode_turns
from sparse_llama.data.packing import one_per_row, pack
from sparse_llama.data.prompt import alpaca_prompt
from sparse_llama.data.records import Example, parse_record, plain_text
from sparse_llama.data.template import with_template
from sparse_llama.data.tokenizer import Tokenizer, load_tokenizer
from sparse_llama.data.view import SeenDocument, seen_documents

RECORDS = [
    {"instruction": "Where does Ann live?", "response": "In Oslo, far away."},
    {"instruction": "Who?", "context": "Ann. \U0001f642", "response": "  Ann \U0001f642\n"},
]


def packed(tokenizer: Tokenizer, examples: list[Example], *, align: int = 16) -> Batch:
    documents = [encode_turns(example, tokenizer) for example in examples]
    return collate(pack(documents, row_length=512, align=align, seed=0))


def said(document: SeenDocument) -> list[tuple[str, bool]]:
    return [(span.text, span.is_learned) for span in document.spans]


def test_documents_are_prompt_and_response_with_the_response_and_its_end_learned(tokenizer: Tokenizer):
    examples = [parse_record(record) for record in RECORDS]
    documents = seen_documents([packed(tokenizer, examples)], tokenizer)
    expected = [
        [("<s>" + alpaca_prompt(record["instruction"], record.get("context", "")), False), (answer, True)]
        for record in RECORDS
        for answer in [record["response"] + "</s>"]
    ]
    assert sorted(map(said, documents)) == sorted(expected)


def test_numbers_beside_a_document_are_those_of_its_tokens(tokenizer: Tokenizer):
    examples = [parse_record(record) for record in RECORDS]
    lengths = {len(encode_turns(example, tokenizer).ids) for example in examples}
    first, second = seen_documents([packed(tokenizer, examples)], tokenizer)
    assert (first.row, first.start, second.row) == (0, 0, 0)
    assert second.start == first.num_tokens + first.num_padded == -(-first.num_tokens // 16) * 16
    assert second.start + second.num_tokens + second.num_padded == 512
    assert {first.num_tokens, second.num_tokens} == lengths
    labelled = [encode_turns(example, tokenizer).labels for example in examples]
    assert {first.num_learned, second.num_learned} == {
        sum(label != -100 for label in labels) for labels in labelled
    }


def test_rows_are_counted_over_micro_batches_and_their_padding_is_told(tokenizer: Tokenizer):
    documents = [encode_turns(plain_text(text), tokenizer) for text in ("Ann", "Ann lives in Oslo", "Bob")]
    rows = one_per_row(documents)
    shown = list(seen_documents([collate(rows[:2]), collate(rows[2:])], tokenizer))
    assert [document.row for document in shown] == [0, 1, 2]
    assert [document.num_padded for document in shown] == [len(rows[1]) - len(rows[0]), 0, 0]
    assert said(shown[1]) == [("<s>", False), ("Ann lives in Oslo</s>", True)]


def test_the_tokens_of_a_chat_template_are_shown_by_name(tmp_path: Path):
    folder = write_byte_level(tmp_path)
    tokenizer = with_template(load_tokenizer(folder), folder, "tokenizer")
    chat = [("user", "Who?"), ("assistant", "Ann."), ("user", "Where?"), ("assistant", "In Oslo.")]
    messages = [{"role": role, "content": content} for role, content in chat]
    example = tokenizer.write_turns(parse_record({"messages": messages}))  # type: ignore[attr-defined]
    (document,) = seen_documents([packed(tokenizer, [example])], tokenizer)
    assert said(document) == [
        ("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Ann.<|im_end|>", True),
        ("\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n", False),
        ("In Oslo.<|im_end|>", True),
    ]


@pytest.mark.real_data
def test_all_of_a_text_is_shown(shared: Path):
    text = (shared / "data" / "tinystories-sample.txt").read_text(encoding="utf-8")[:1500]
    tokenizer = load_tokenizer(shared / "models" / "stories260K")
    batch = collate(one_per_row([encode_turns(plain_text(text), tokenizer)]))
    (document,) = seen_documents([batch], tokenizer)
    assert said(document) == [("<s>", False), (text + "</s>", True)]
