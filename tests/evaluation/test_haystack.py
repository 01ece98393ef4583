"""Long prompts: one needle, where it should be, in as many tokens as were asked for."""

import re
from typing import Any

import pytest

from sparse_llama.config.bundled import resolve_bundled
from sparse_llama.data.tokenizer import load_tokenizer
from sparse_llama.errors import ConfigError, DataError
from sparse_llama.evaluation.haystack import KINDS, Prompt, equal_depths, make_prompts

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (300, 512, 900)
LONGEST_SENTENCE = 14  # words, of our own filler
LONGEST_WORD = 12  # tokens: of bytes, "Outside " or "Tatimi. "
TEXT = "It rained ! The number 48213 is prime . Nobody asked ?\n" + "word " * 300 + "\nThe end of it ."


class ByteTokenizer:
    """A token for every byte."""

    bos_id, eos_id, vocab_size = 1, 2, 259

    def encode(self, text: str) -> list[int]:
        return [3 + byte for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(token - 3 for token in ids if token > 2).decode(errors="replace")


class Wordless(ByteTokenizer):
    """A tokenizer whose vocabulary has no digits."""

    def decode(self, ids: list[int]) -> str:
        return re.sub(r"\d", "?", super().decode(ids))


@pytest.fixture(params=["sentencepiece", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    folder = resolve_bundled("bundled:tiny-llama")
    assert folder is not None
    return ByteTokenizer() if request.param == "bytes" else load_tokenizer(folder)


def make(tokenizer: Any, kind: Any, **options: Any) -> list[Prompt]:
    asked = {"lengths": LENGTHS, "depths": DEPTHS, "trials": 2, "seed": 3} | options
    return make_prompts(tokenizer, kind, **asked)


def read(prompt: Prompt) -> tuple[str, list[str]]:
    """Return the name that is asked for, and every number that the text gives it."""
    asked = re.search(r" What is the secret number of (\w+)\? The secret number of \1 is$", prompt.text)
    assert asked is not None
    return asked[1], re.findall(rf"The secret number of {asked[1]} is (\d+)\.", prompt.text)


def around(prompt: Prompt) -> tuple[str, str]:
    """Return the text before the needle, and the text after it up to the question."""
    name, (number,) = read(prompt)
    body = prompt.text.rsplit(" What is", 1)[0]
    before, after = f" {body} ".split(f" The secret number of {name} is {number}. ")
    return before.strip(), after.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_finds_the_answer_and_finds_it_once(tokenizer, kind):
    for prompt in make(tokenizer, kind):
        _, found = read(prompt)
        assert [f" {number}" for number in found] == [prompt.answer]
        assert prompt.text.count(prompt.answer) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_answer_are_as_many_tokens_as_asked_for_less_a_part_of_a_word(tokenizer, kind):
    for prompt in make(tokenizer, kind):
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt.text + prompt.answer)]
        assert [*prompt.prompt_ids, *prompt.answer_ids] == ids
        assert prompt.length - LONGEST_WORD < len(ids) <= prompt.length
        assert tokenizer.decode(list(prompt.prompt_ids)).strip() == prompt.text


@pytest.mark.parametrize("kind", KINDS)
def test_the_needle_stands_at_its_depth_to_half_a_sentence(tokenizer, kind):
    for prompt in make(tokenizer, kind):
        before, after = (part.split() for part in around(prompt))
        assert abs(len(before) - prompt.depth * len(before + after)) <= LONGEST_SENTENCE / 2
        if prompt.depth in (0, 1):
            assert (after if prompt.depth else before) == []


def test_a_share_of_words_is_a_share_of_tokens():
    tokenizer: Any = ByteTokenizer()
    for prompt in make(tokenizer, "needle", lengths=[5000]):
        before, after = around(prompt)
        assert len(before) / len(before + after) == pytest.approx(prompt.depth, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_one_length_differ_by_depth_in_the_needles_place_alone(tokenizer, kind):
    prompts = make(tokenizer, kind, lengths=[512], trials=1)
    bodies = [" ".join(around(prompt)).split() for prompt in prompts]
    shortest = min(map(len, bodies))
    assert len({read(prompt)[0] for prompt in prompts}) == 1
    assert len({tuple(body[-shortest:]) for body in bodies}) == 1
    assert max(map(len, bodies)) - shortest <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_those_of_the_seed(tokenizer, kind):
    prompts = make(tokenizer, kind)
    assert prompts == make(tokenizer, kind)
    assert len({read(prompt)[0] for prompt in prompts}) == len(LENGTHS) * 2  # names: of length and trial
    other = make(tokenizer, kind, seed=4)
    assert not {prompt.text for prompt in prompts} & {prompt.text for prompt in other}


def test_one_length_or_depth_more_changes_no_prompt_of_the_others(tokenizer):
    fewer = make(tokenizer, "needle", lengths=[512], depths=[0.5])
    assert set(fewer) < set(make(tokenizer, "needle"))


def test_filler_is_the_text_given_word_by_word_again_and_again(tokenizer):
    words = " ".join(TEXT.split())
    for prompt in make(tokenizer, "needle", lengths=[900], text=TEXT):
        before, after = around(prompt)
        assert f"{before} {after}".strip() in f"{words} {words} {words}"
        assert "48213" not in prompt.answer


@pytest.mark.parametrize("part", [0, 1], ids=["name", "number"])
def test_a_name_and_a_number_that_are_in_the_text_are_not_asked_for(part):
    tokenizer: Any = ByteTokenizer()
    asked = {"lengths": [400], "depths": [0.5], "trials": 1}
    (first,) = make(tokenizer, "needle", **asked, text=TEXT)
    fact = (read(first)[0], first.answer.strip())
    (second,) = make(tokenizer, "needle", **asked, text=f"{TEXT} So it is {fact[part]} .")
    assert fact[part] not in (read(second)[0], second.answer.strip())


def test_filler_begins_anywhere_in_the_text_given(tokenizer):
    text = " ".join(f"This is {word}." for word in ("one", "two", "three", "four", "five", "six"))
    prompts = make(tokenizer, "needle", depths=[1], trials=9, text=text)
    assert len({around(prompt)[0][-12:] for prompt in prompts}) > 3


def test_text_without_full_stops_has_places_for_a_needle_too(tokenizer):
    prompts = make(tokenizer, "needle", lengths=[900], text="word " * 400)
    shares = [len(around(prompt)[0]) / len(" ".join(around(prompt))) for prompt in prompts]
    assert shares == pytest.approx([prompt.depth for prompt in prompts], abs=0.2)


def test_depths_are_at_equal_distances_from_the_beginning_to_the_end():
    assert equal_depths(5) == DEPTHS
    assert equal_depths(2) == (0.0, 1.0)
    assert equal_depths(1) == (0.5,)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shortest_length_is_the_needle_and_the_question_alone(tokenizer, kind):
    with pytest.raises(
        ConfigError, match=r"--lengths: 9 tokens are too few; .* and answer are \d+$"
    ) as refused:
        make(tokenizer, kind, lengths=[9], trials=1)
    least = int(str(refused.value).rsplit(" ", 1)[1])
    (prompt,) = make(tokenizer, kind, lengths=[least + 4], depths=[0.5], trials=1)
    assert len(read(prompt)[1]) == 1


def test_text_without_words_and_a_tokenizer_without_digits_are_refused():
    tokenizer: Any = ByteTokenizer()
    with pytest.raises(DataError, match="--data: text without a word"):
        make(tokenizer, "needle", text=" \n ")
    tokenizer = Wordless()
    with pytest.raises(DataError, match=r"--retrieval: .* reads '\d{5}' and writes '\?{5}'; no model"):
        make(tokenizer, "needle")
