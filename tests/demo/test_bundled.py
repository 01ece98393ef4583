"""The bundled model, tokenizer and data set: what a demo, offline, relies on."""

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import LlamaForCausalLM

import sparse_llama.demo
from sparse_llama.data.prompt import alpaca_prompt
from sparse_llama.demo.base import encode_document
from sparse_llama.demo.dataset import make_records, write_dataset
from sparse_llama.demo.frames import ANSWER, FRAME, Span
from sparse_llama.demo.tokenizer import train_tokenizer
from sparse_llama.demo.world import World, make_world

BUNDLED = Path(sparse_llama.demo.__file__).parent / "bundled"
MODEL, PEOPLE = BUNDLED / "model", BUNDLED / "data" / "people"


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def complete(
    model: LlamaForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor, prompt: str, count: int
) -> str:
    """Return the ``count`` likeliest tokens after ``prompt``, one by one, as text."""
    ids = [1, *tokenizer.encode(prompt)]
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:])


def test_the_data_set_is_what_the_script_writes_byte_for_byte(tmp_path: Path):
    write_dataset(tmp_path)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (PEOPLE / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_tokenizer_cuts_the_records_as_the_scripts_tokenizer_does(
    world: World, tokenizer: sentencepiece.SentencePieceProcessor, tmp_path: Path
):
    train_tokenizer(world, tmp_path / "tokenizer.model")
    again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for record in make_records(world)[1]:
        prompt = alpaca_prompt(record["instruction"], record["context"])
        assert tokenizer.encode(prompt, out_type=str) == again.encode(prompt, out_type=str)


def test_every_record_has_the_four_fields_of_dolly():
    for path in PEOPLE.glob("*.jsonl"):
        for line in path.read_text(encoding="ascii").splitlines():
            assert set(json.loads(line)) == {"instruction", "context", "response", "category"}


def test_the_model_folder_is_at_most_six_megabytes_and_the_data_one_and_a_half():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 6_000_000
    assert sum(path.stat().st_size for path in PEOPLE.iterdir()) <= 1_500_000


def test_the_model_is_a_llama_with_grouped_key_value_heads(model: LlamaForCausalLM):
    config = model.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.max_position_embeddings == 2048
    assert config.vocab_size == model.lm_head.out_features


@pytest.mark.parametrize(
    "text", ["one\ntwo\n\nthree", "double  and   triple", " \U0001f600 caf\u00e9 ", "\t\r\n"]
)
def test_the_tokenizer_gives_every_text_back(tokenizer: sentencepiece.SentencePieceProcessor, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizers_special_ids_are_those_of_llama(tokenizer: sentencepiece.SentencePieceProcessor):
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)


def test_a_prompt_is_a_prefix_of_prompt_and_response_and_both_fit_the_sparse_window(
    world: World, tokenizer: sentencepiece.SentencePieceProcessor
):
    for record in (record for part in make_records(world) for record in part):
        prompt = alpaca_prompt(record["instruction"], record["context"])
        ids, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + record["response"])
        assert whole[: len(ids)] == ids
        assert len(whole) <= 128


def test_the_base_knows_the_facts_of_people_in_its_own_frames(
    world: World, model: LlamaForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor
):
    known = 0
    for name in world.held_out_people:
        prompt = f"# Question:\nWhere does {name} live?\n\n# Answer:\nIt is"
        known += complete(model, tokenizer, prompt, 1) == world.people[name]["city"]
    assert known >= 13  # of 15; a guess is right once in 14


def test_the_base_finds_a_fact_in_a_text_it_never_saw(
    world: World, model: LlamaForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor
):
    """By what is asked for. It does not tell apart two people of one text who both live somewhere."""
    found = 0
    cities = ("Oslo", "Cairo", "Lima", "Tokyo", "Quito", "Sofia", "Perth")
    for number, (first, second) in enumerate(
        zip(world.held_out_strangers[:14], world.held_out_strangers[14:28], strict=True)
    ):
        city = cities[number % len(cities)]
        facts = [f"{second} lives in {city}.", f"{first} works as a baker."]
        text = " ".join(facts if number % 2 else reversed(facts))
        prompt = f"# Question:\nWhere does {second} live?\n\n# Text:\n{text}\n\n# Answer:\nIt is"
        found += complete(model, tokenizer, prompt, 1) == city
    assert found >= 12  # of 14; a guess among the 14 cities is right once


def test_an_answers_tokens_weigh_one_and_the_space_before_it_counts_as_its_first(
    tokenizer: sentencepiece.SentencePieceProcessor,
):
    document = [Span("Ask: Where does Mira live? ", FRAME), Span("Oslo.", ANSWER)]
    ids, weights = encode_document(document, tokenizer, end_weight=0.3)
    pieces = [tokenizer.id_to_piece(token) for token in ids]
    assert pieces[-3:] == ["\u2581Oslo", ".", "</s>"]
    assert weights[-3:] == [1.0, 1.0, 0.3]
    assert set(weights[1:-3]) == {0.1}
    assert len(ids) == len(weights)
