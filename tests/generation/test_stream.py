"""Streaming: joined pieces are the whole text, and no piece ends inside a character."""

from pathlib import Path

import pytest
import torch
from adapted_models import adapt

from sparse_llama.config.bundled import resolve_bundled
from sparse_llama.data.prompt import alpaca_prompt
from sparse_llama.data.tokenizer import Tokenizer, load_tokenizer
from sparse_llama.generation import TextStream, continuation, encode_prompt, generate_batch, generate_stream

TEXTS = [
    "Mira lives in Oslo. She  has two  cats.",
    " leading and trailing ",
    "line\n\n  indented\n",
    "caf\u00e9, \u4f60\u597d, \U0001f642\U0001f469\u200d\U0001f680, \u0410\u0431\u0432",
    "12345 + 67 = \u221e",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    folder = resolve_bundled("bundled:tiny-llama")
    assert folder is not None
    return load_tokenizer(folder)


def pieces_of(tokenizer: Tokenizer, prompt_ids: list[int], new_ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt_ids)
    return [piece for piece in [*map(stream.add, new_ids), stream.finish()] if piece]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_in_pieces_of_whole_characters(tokenizer, text):
    pieces = pieces_of(tokenizer, [tokenizer.bos_id], tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_four_tokens_is_one_piece(tokenizer):
    new_ids = tokenizer.encode("a\U0001f642b")
    assert len(new_ids) >= 6, "the emoji has to be spelt in bytes"
    assert "\U0001f642" in pieces_of(tokenizer, [tokenizer.bos_id], new_ids)


@pytest.mark.parametrize("prompt", ["", "Where does", "ends in a newline\n", "\U0001f642"])
def test_any_tokens_at_all_add_up_to_what_decoding_them_at_once_adds(tokenizer, prompt):
    """Most random tokens are no text: bytes that start or end no character, spaces alone, controls."""
    generator = torch.Generator().manual_seed(4)
    prompt_ids = encode_prompt(tokenizer, prompt)
    for _ in range(40):
        share_of_bytes = torch.rand((), generator=generator)
        pieces = torch.randint(tokenizer.vocab_size, (60,), generator=generator)
        single_bytes = torch.randint(3, 259, (60,), generator=generator)
        is_byte = torch.rand(60, generator=generator) < share_of_bytes
        new_ids = single_bytes.where(is_byte, pieces).tolist()
        whole = continuation(tokenizer, prompt_ids, new_ids)
        assert "".join(pieces_of(tokenizer, prompt_ids, new_ids)) == whole


def test_a_character_that_is_never_finished_is_shown_at_the_end(tokenizer):
    cut = tokenizer.encode("a\U0001f642")[:-1]
    pieces = pieces_of(tokenizer, [tokenizer.bos_id], cut)
    assert "".join(pieces) == tokenizer.decode(cut)
    assert "\ufffd" in pieces[-1]


def test_what_a_model_streams_is_its_whole_answer(tiny_llama, tokenizer):
    model = adapt(tiny_llama(vocab_size=tokenizer.vocab_size, max_position_embeddings=512), "v2")
    prompt = alpaca_prompt("Where does Mira live?", "Mira lives in Oslo.")
    pieces = list(generate_stream(model, tokenizer, prompt, max_new_tokens=60))
    assert len(pieces) > 10
    assert generate_batch(model, tokenizer, [prompt], 60) == ["".join(pieces)]


def test_the_first_word_after_text_keeps_its_space_and_the_first_of_all_has_none(tokenizer):
    ids = tokenizer.encode("Mira lives")
    length = next(n for n in range(len(ids)) if tokenizer.decode(ids[:n]) == "Mira")
    assert "".join(pieces_of(tokenizer, [tokenizer.bos_id, *ids[:length]], ids[length:])) == " lives"
    assert "".join(pieces_of(tokenizer, [tokenizer.bos_id], ids)) == "Mira lives"


@pytest.mark.real_data
def test_a_real_corpus_streams_unchanged(shared: Path):
    tokenizer = load_tokenizer(shared / "models" / "stories260K")
    text = (shared / "data" / "wikitext-2-test.txt").read_text(encoding="utf-8")[:20_000]
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, encode_prompt(tokenizer, ""), ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(pieces) > 3_000
