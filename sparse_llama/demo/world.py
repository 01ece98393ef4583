"""The invented world: people with five fixed facts each, strangers, and the words to tell and to ask with.

A *person* has facts that never change; the corpus repeats them until the base knows them by heart. A
*stranger* has facts for the length of one text; whoever is asked about one has to find the answer there.
"""

import random
from dataclasses import dataclass

_WORDS = {
    "city": "Oslo Lima Cairo Delhi Tokyo Paris Quito Accra Dakar Hanoi Sofia Turin Perth Miami",
    "job": "baker pilot nurse farmer singer tailor miner judge painter sailor teacher driver",
    "pet": "cat dog parrot horse rabbit turtle goat fox hen snake hamster donkey",
    "color": "red blue green black white yellow purple orange pink brown gray silver",
    "food": "rice soup bread fish cheese beans pasta honey corn cake salad butter",
}
VALUES: dict[str, tuple[str, ...]] = {kind: tuple(words.split()) for kind, words in _WORDS.items()}
KINDS: tuple[str, ...] = tuple(VALUES)

TELLINGS: dict[str, tuple[str, ...]] = {
    "city": (
        "{name} lives in {value}.",
        "{name} has a house in {value}.",
        "The house of {name} stands in {value}.",
    ),
    "job": (
        "{name} works as a {value}.",
        "{name} earns money as a {value}.",
        "People call {name} a good {value}.",
    ),
    "pet": ("{name} has a {value}.", "{name} keeps a {value} at home.", "At home {name} feeds a {value}."),
    "color": (
        "{name} likes the color {value}.",
        "{name} paints the wall {value}.",
        "The door of {name} is {value}.",
    ),
    "food": ("{name} loves {value}.", "{name} eats {value} every day.", "For dinner {name} cooks {value}."),
}
# How the data set's responses tell a fact. Prose never does, so that the base has no habit of answering so;
# and the name is never the first word, where it would be another piece of the tokenizer than in the question.
ANSWERS: dict[str, str] = {
    "city": "The city of {name} is {value}.",
    "job": "The job of {name} is {value}.",
    "pet": "The pet of {name} is a {value}.",
    "color": "The color of {name} is {value}.",
    "food": "The food of {name} is {value}.",
}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "city": ("Where does {name} live?", "In which city does {name} live?", "Tell me the city of {name}."),
    "job": ("What is the job of {name}?", "What does {name} work as?", "Tell me the job of {name}."),
    "pet": ("What pet does {name} have?", "Which pet does {name} keep?", "Tell me the pet of {name}."),
    "color": (
        "What color does {name} like?",
        "Which color does {name} like best?",
        "Tell me the color of {name}.",
    ),
    "food": ("What does {name} eat?", "What food does {name} love?", "Tell me the food of {name}."),
}
CHOICES: tuple[str, ...] = (
    "Does the word {word} name a {first} or a {second}?",
    "Which does {word} name, a {first} or a {second}?",
    "Tell me if {word} is the name of a {first} or a {second}.",
)
CHOICE_ANSWER = "The word {word} names a {kind}."

_STARTS = "Mi Ta Lo Ka Ze Ru Ni Bo Sa Fe Do Li Pa Ve Hu Ga"
_ENDS = "ra len vin dor mi na ko ris tal bel"
_NUM_PEOPLE, _NUM_HELD_OUT_PEOPLE = 60, 15
_NUM_HELD_OUT_STRANGERS = 30
_NUM_HELD_OUT_WORDS_PER_KIND = 3


@dataclass(frozen=True)
class World:
    """Who lives there, and who and what the training records never ask about."""

    people: dict[str, dict[str, str]]
    """Name -> kind -> value, the facts that never change."""

    strangers: tuple[str, ...]
    """Names without fixed facts."""

    held_out_people: tuple[str, ...]
    held_out_strangers: tuple[str, ...]
    held_out_words: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One thing that is true of somebody."""

    name: str
    kind: str
    value: str


def make_world(seed: int = 0) -> World:
    """Return the world of ``seed``: always the same people, with the same facts."""
    rng = random.Random(seed)
    names = [start + end for start in _STARTS.split() for end in _ENDS.split()]
    cities = set(VALUES["city"])  # Pa-ris would be one
    names = [name for name in names if name not in cities]
    rng.shuffle(names)
    people = {
        name: {kind: rng.choice(values) for kind, values in VALUES.items()} for name in names[:_NUM_PEOPLE]
    }
    strangers = tuple(names[_NUM_PEOPLE:])
    words = [word for values in VALUES.values() for word in rng.sample(values, _NUM_HELD_OUT_WORDS_PER_KIND)]
    return World(
        people=people,
        strangers=strangers,
        held_out_people=tuple(list(people)[-_NUM_HELD_OUT_PEOPLE:]),
        held_out_strangers=strangers[-_NUM_HELD_OUT_STRANGERS:],
        held_out_words=tuple(words),
    )


def kind_of(word: str) -> str:
    """Return what ``word`` names: the kind among whose values it is."""
    return next(kind for kind, values in VALUES.items() if word in values)


def passer_by(rng: random.Random) -> str:
    """Return a name that nobody in the world bears: the world's 159 are one token each, this is several."""
    return rng.choice(_STARTS.split()) + rng.choice(_ENDS.split()) + rng.choice("aeiou") + rng.choice("nrst")


def tell(fact: Fact, rng: random.Random) -> str:
    """Return a sentence that states ``fact`` in one of the ways of telling."""
    return rng.choice(TELLINGS[fact.kind]).format(name=fact.name, value=fact.value)


def answer(fact: Fact) -> str:
    """Return the one sentence for ``fact`` that the data set's responses use."""
    return ANSWERS[fact.kind].format(name=fact.name, value=fact.value)


def ask(fact: Fact, rng: random.Random) -> str:
    """Return a question whose answer is ``fact``."""
    return rng.choice(QUESTIONS[fact.kind]).format(name=fact.name)


def facts_of(name: str, world: World) -> list[Fact]:
    """Return the five facts of a person, in the order of the kinds."""
    return [Fact(name, kind, value) for kind, value in world.people[name].items()]


def scene(names: list[str], facts_each: int, rng: random.Random) -> list[Fact]:
    """Return facts made up on the spot about ``names``, shuffled, values differing within a kind."""
    facts: list[Fact] = []
    for name in names:
        for kind in rng.sample(KINDS, facts_each):
            taken = {fact.value for fact in facts if fact.kind == kind}
            free = [value for value in VALUES[kind] if value not in taken]
            facts.append(Fact(name, kind, rng.choice(free)))
    rng.shuffle(facts)
    return facts


def choice(word: str, rng: random.Random) -> tuple[str, str]:
    """Return a question which of two kinds ``word`` names, and the sentence that answers it."""
    kind = kind_of(word)
    other = rng.choice([one for one in KINDS if one != kind])
    first, second = rng.sample([kind, other], 2)
    question = rng.choice(CHOICES).format(word=word, first=first, second=second)
    return question, CHOICE_ANSWER.format(word=word, kind=kind)
