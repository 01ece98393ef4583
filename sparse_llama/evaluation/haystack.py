"""Long prompts with one fact to find: generated from a seed, so that nothing has to be downloaded.

Two kinds, both questions that a text answers word for word, so that a base model without any tuning can go on
with the answer:

needle  one sentence with a number, among filler (Kamradt 2023, "needle in a haystack"; passkey retrieval,
        Mohtashami and Jaggi 2023, arXiv:2305.16300)
pairs   the same sentence among others of its form, with other names and numbers (key-value retrieval, Liu et
        al. 2023, arXiv:2307.03172, section 3; theirs are UUIDs in JSON)

The length is in tokens, from the beginning of sequence to the end of the answer. Filler is cut at its front
to meet it: a prompt is shorter by less than a word of it. The depth is the share of the other words that
stand before the needle, which is between two sentences: 0 is the beginning of the text, 1 its end.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.errors import ConfigError, DataError
from sparse_llama.generation import continuation, encode_prompt

Kind = Literal["needle", "pairs"]
KINDS: tuple[Kind, ...] = ("needle", "pairs")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_LONGEST_PIECE = 40  # words: the needle stands between pieces, also in text without full stops
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_NUMBERS = (10_000, 99_999)  # five digits: 1 in 90,000 is guessed
_FILLER = (
    ("old", "quiet", "tall", "young", "kind", "tired", "clever", "slow"),
    ("baker", "farmer", "teacher", "sailor", "painter", "doctor", "singer", "driver"),
    ("walked", "waited", "worked", "rested", "sang", "read", "talked", "slept"),
    ("near", "behind", "beside", "outside"),
    ("market", "river", "school", "garden", "bridge", "station", "library", "harbor"),
    ("in the morning", "at noon", "after lunch", "in the rain", "every day", "until late", "for a while"),
)


@dataclass(frozen=True)
class Prompt:
    """A text that ends in the middle of a sentence, and the words that the text says it goes on with."""

    text: str
    answer: str
    """With the space in front of it."""
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    length: int
    """That was asked for, in tokens; there are as many ids or a few less."""
    depth: float
    """That was asked for, from 0 to 1."""


def equal_depths(count: int) -> tuple[float, ...]:
    """Return ``count`` depths at equal distances from 0 to 1; the middle alone where it is one."""
    return (0.5,) if count == 1 else tuple(place / (count - 1) for place in range(count))


def make_prompts(
    tokenizer: Tokenizer,
    kind: Kind,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int,
    text: str | None = None,
) -> list[Prompt]:
    """Return ``trials`` prompts for every length and depth, the same for the same tokenizer and ``seed``.

    Those of one length differ by depth in nothing but the needle's place.

    Args:
        text: filler for ``needle``, begun at any of its sentences and repeated where it is too short; None
            is filler of our own.

    Raises:
        ConfigError: a length has no room for needle, question and answer.
        DataError: the text has no words, or the tokenizer cannot write the answers.
    """
    assert kind == "needle" or text is None
    pieces = None if text is None else _pieces_of(text)
    return [
        _make_prompt(tokenizer, kind, length, depth, random.Random(f"{seed} {kind} {length} {trial}"), pieces)
        for length in lengths
        for depth in depths
        for trial in range(trials)
    ]


def _make_prompt(
    tokenizer: Tokenizer,
    kind: Kind,
    length: int,
    depth: float,
    draw: random.Random,
    pieces: Sequence[str] | None,
) -> Prompt:
    facts = _facts(draw)
    name, number = next(fact for fact in facts if not _is_in(fact, pieces or ()))
    needle = f"The secret number of {name} is {number}."
    question = f"What is the secret number of {name}? The secret number of {name} is"
    bare = len(encode_prompt(tokenizer, f"{needle} {question} {number}"))
    if bare > length:
        raise ConfigError(f"--lengths: {length} tokens are too few; needle, question and answer are {bare}")
    if kind == "pairs":
        filler = (f"The secret number of {other} is {value}." for other, value in facts)
    elif pieces is None:
        filler = (_filler_sentence(draw) for _ in cycle([None]))
    else:
        filler = islice(cycle(pieces), draw.randrange(len(pieces)), None)
    words, starts = _enough_words(tokenizer, filler, length - bare)
    while True:
        place = _place(starts, len(words), depth)
        text = " ".join([*words[:place], needle, *words[place:], question])
        prompt = _encode(tokenizer, text, f" {number}", length, depth)
        surplus = len(prompt.prompt_ids) + len(prompt.answer_ids) - length
        if surplus <= 0:
            return prompt
        num_dropped = _words_worth(tokenizer, words, surplus)
        words = words[num_dropped:]
        starts = [0, *(start - num_dropped for start in starts if start > num_dropped)]


def _encode(tokenizer: Tokenizer, text: str, answer: str, length: int, depth: float) -> Prompt:
    ids, whole = encode_prompt(tokenizer, text), encode_prompt(tokenizer, text + answer)
    # a tokenizer may join the end of a text and what follows: the answer begins where the ids differ
    num_shared = len(ids)
    while whole[:num_shared] != ids[:num_shared]:
        num_shared -= 1
    given, wanted = whole[:num_shared], whole[num_shared:]
    if continuation(tokenizer, given, wanted).strip() != answer.strip():
        raise DataError(
            f"--retrieval: the tokenizer reads {answer.strip()!r} and writes "
            f"{continuation(tokenizer, given, wanted).strip()!r}; no model with it can answer"
        )
    return Prompt(text, answer, tuple(given), tuple(wanted), length, depth)


def _place(starts: Sequence[int], num_words: int, depth: float) -> int:
    """Return the beginning of a sentence, or the end of all, that is nearest to the ``depth``."""
    return min((*starts, num_words), key=lambda start: abs(start - depth * num_words))


def _enough_words(
    tokenizer: Tokenizer, sentences: Iterator[str], num_tokens: int
) -> tuple[list[str], list[int]]:
    """Return words of ``sentences`` worth ``num_tokens`` at least, and where each sentence begins."""
    words: list[str] = []
    starts: list[int] = []
    found = 0
    while found < num_tokens:
        sentence = next(sentences).split()
        starts.append(len(words))
        words += sentence
        found += _num_tokens(tokenizer, " ".join(sentence))
    return words, starts


def _words_worth(tokenizer: Tokenizer, words: Sequence[str], num_tokens: int) -> int:
    """Return how many of the first words are worth ``num_tokens``: one at least, and rather too few."""
    worth = 0
    for count, word in enumerate(words):
        # within text, where tokenizers do not put a space in front and some need one
        worth += _num_tokens(tokenizer, f"{word} {word}") - _num_tokens(tokenizer, word)
        if worth > num_tokens:
            return max(1, count)
    return max(1, len(words))


def _num_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text))


def _facts(draw: random.Random) -> Iterator[tuple[str, int]]:
    """Yield names and numbers, none of them twice."""
    seen: set[str | int] = set()
    while True:
        name = "".join(draw.choice(letters) for letters in (_CONSONANTS, _VOWELS) * 3).capitalize()
        number = draw.randint(*_NUMBERS)
        if name not in seen and number not in seen:
            seen |= {name, number}
            yield name, number


def _filler_sentence(draw: random.Random) -> str:
    adjective, person, verb, where, place, when = (draw.choice(words) for words in _FILLER)
    return f"The {adjective} {person} {verb} {where} the {place} {when}."


def _pieces_of(text: str) -> list[str]:
    """Return the sentences of ``text``, long ones in pieces."""
    sentences = [sentence.split() for sentence in _SENTENCE_END.split(text)]
    pieces = [
        " ".join(words[first : first + _LONGEST_PIECE])
        for words in sentences
        for first in range(0, len(words), _LONGEST_PIECE)
    ]
    if not pieces:
        raise DataError("--data: text without a word cannot be a haystack; leave it out")
    return pieces


def _is_in(fact: tuple[str, int], pieces: Sequence[str]) -> bool:
    """Return whether filler would be a second needle, or answer without one."""
    return any(str(part) in piece for part in fact for piece in pieces)
