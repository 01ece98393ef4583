"""The corpus that the base is trained on: prose, and questions in hundreds of frames and several styles.

The instruction template is never among the frames, nor is anything close to it; and the answers are mostly
words or "It is ...". The sentence that the data set asks for comes rarely, and never without words before it.
So the base knows the world and how to look things up, and a fine-tune has one thing to teach: how to answer.
"""

import random
from collections.abc import Callable, Iterator
from typing import Literal

from sparse_llama.demo.frames import ANSWER, FRAME, NOISE, Quiz, Span, framed, gap, preamble
from sparse_llama.demo.world import (
    KINDS,
    VALUES,
    Fact,
    World,
    answer,
    ask,
    choice,
    facts_of,
    kind_of,
    passer_by,
    scene,
    tell,
)

Stage = Literal["warm_up", "main", "late"]


def documents(world: World, seed: int, stage: Stage = "main") -> Iterator[list[Span]]:
    """Yield the corpus' documents without end, the same ones for the same seed.

    Args:
        stage: ``warm_up`` leaves only the plainest look-ups and the facts, for the base's first steps;
            ``late`` has more questions with the text that answers them behind, for its last.
    """
    rng = random.Random(seed)
    makers, weights = zip(*_STAGES[stage], strict=True)
    while True:
        yield rng.choices(makers, weights)[0](world, rng)


def text_of(document: list[Span]) -> str:
    """Return the document as one string."""
    return "".join(span.text for span in document)


def biography(world: World, rng: random.Random) -> list[Span]:
    """Return prose that tells all facts of one person, in random order and words."""
    facts = facts_of(rng.choice(list(world.people)), world)
    rng.shuffle(facts)
    return [Span(_prose(facts, rng), ANSWER)]


def retelling(world: World, rng: random.Random) -> list[Span]:
    """Return facts about strangers told twice in different words: the second time, each can be looked up."""
    facts = scene(_strangers(world, rng.randint(1, 3), rng), rng.randint(1, 3), rng)
    first, second = _prose(facts, rng), _prose(rng.sample(facts, len(facts)), rng)
    return [Span(preamble(rng), NOISE), Span(first + gap(rng), FRAME), Span(second, ANSWER)]


def register(world: World, rng: random.Random) -> list[Span]:
    """Return a list of strangers with a value each, then the same list in another order."""
    names = _strangers(world, rng.randint(2, 6), rng)
    between = rng.choice((" ", ": ", " - ", " = "))
    entries = [(name, rng.choice(VALUES[rng.choice(KINDS)])) for name in names]
    first = "\n".join(name + between + value for name, value in entries)
    spans = [Span(preamble(rng), NOISE), Span(first, FRAME)]
    for name, value in rng.sample(entries, len(entries)):
        spans += [Span("\n" + name + between.rstrip(), FRAME), Span(" " + value, ANSWER)]
    return spans


def recall(world: World, rng: random.Random) -> list[Span]:
    """Return one to five questions about people, answered from memory."""
    names = list(world.people)
    facts = [rng.choice(facts_of(rng.choice(names), world)) for _ in range(_length(rng, 5))]
    return framed([_quiz(fact, rng) for fact in facts], "", rng)


def reading(world: World, rng: random.Random) -> list[Span]:
    """Return a text about strangers, and questions that it answers."""
    facts = scene(_strangers(world, rng.randint(1, 3), rng), rng.randint(1, 2), rng)
    context = _prose(facts, rng)
    asked = rng.sample(facts, min(len(facts), _length(rng, 6)))
    return framed([_quiz(fact, rng) for fact in asked], context, rng)


def readings(world: World, rng: random.Random) -> list[Span]:
    """Return one to three questions, each beside a short text of its own that answers it."""
    quizzes: list[Quiz] = []
    for _ in range(_length(rng, 3)):
        facts = scene(_strangers(world, rng.randint(1, 2), rng), rng.randint(1, 2), rng)
        context = _prose(facts, rng)
        quizzes.append(_quiz(rng.choice(facts), rng, context))
    return framed(quizzes, "", rng)


def lookup(world: World, rng: random.Random) -> list[Span]:
    """Return one or two questions, each before a text that answers it, answered in sentences.

    A sentence names who was asked about. With the text behind the question another name is nearer; without
    these documents the base copies that one in a third of its answers.
    """
    quizzes: list[Quiz] = []
    for _ in range(rng.randint(1, 2)):
        facts = scene(_strangers(world, rng.randint(1, 2), rng), rng.randint(1, 2), rng)
        quizzes.append(_quiz(rng.choice(facts), rng, _prose(facts, rng)))
    return framed(quizzes, "", rng, is_lookup=True)


def sorting(world: World, rng: random.Random) -> list[Span]:
    """Return one to five questions which of two kinds a word names."""
    words = [word for values in VALUES.values() for word in values]
    quizzes: list[Quiz] = []
    for word in rng.sample(words, _length(rng, 5)):
        question, sentence = choice(word, rng)
        quizzes.append(Quiz(question, kind_of(word), sentence))
    return framed(quizzes, "", rng)


_Maker = Callable[[World, random.Random], list[Span]]
_WARM_UP: tuple[tuple[_Maker, float], ...] = ((register, 0.6), (retelling, 0.2), (biography, 0.2))
_DOCUMENTS: tuple[tuple[_Maker, float], ...] = (
    (biography, 0.10),
    (retelling, 0.20),
    (register, 0.10),
    (recall, 0.15),
    (reading, 0.25),
    (readings, 0.20),
    (sorting, 0.05),
)
_LATE: tuple[tuple[_Maker, float], ...] = (
    (biography, 0.05),
    (retelling, 0.10),
    (register, 0.05),
    (recall, 0.15),
    (reading, 0.15),
    (readings, 0.10),
    (lookup, 0.35),
    (sorting, 0.05),
)
_STAGES = {"warm_up": _WARM_UP, "main": _DOCUMENTS, "late": _LATE}


def _length(rng: random.Random, most: int) -> int:
    """Return how many questions to ask: one in two fifths of the documents, since a prompt holds one."""
    return 1 if rng.random() < 0.4 else rng.randint(2, most)


def _prose(facts: list[Fact], rng: random.Random) -> str:
    """Return one sentence per fact, at times one a line, whose first word is another piece there."""
    return ("\n" if rng.random() < 0.3 else " ").join(tell(fact, rng) for fact in facts)


def _strangers(world: World, count: int, rng: random.Random) -> list[str]:
    if rng.random() < 0.8:
        return rng.sample(world.strangers, count)
    return [passer_by(rng) for _ in range(count)]


def _quiz(fact: Fact, rng: random.Random, context: str = "") -> Quiz:
    return Quiz(ask(fact, rng), fact.value, answer(fact), context)
