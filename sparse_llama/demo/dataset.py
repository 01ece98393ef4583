"""The demo's data set: records in the Dolly schema, for training and for validation.

Every response is a full sentence. Validation asks about people, strangers and words that no training record
asks about; the corpus tells of all of them, so the base can know the answer.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

from sparse_llama.demo.world import (
    VALUES,
    World,
    answer,
    ask,
    choice,
    facts_of,
    make_world,
    scene,
    tell,
)

DATA_SEED = 11
NUM_TRAINING, NUM_VALIDATION_PER_CATEGORY = 2400, 60
CATEGORIES = ("closed_book", "closed_qa", "classification")

Record = dict[str, str]


def make_records(world: World, seed: int = DATA_SEED) -> tuple[list[Record], list[Record]]:
    """Return the training and the validation records; no instruction with its context occurs twice."""
    rng = random.Random(seed)
    seen: set[tuple[str, str]] = set()
    training = _fill(world, rng, NUM_TRAINING, seen, held_out=False)
    validation = _fill(world, rng, NUM_VALIDATION_PER_CATEGORY * len(CATEGORIES), seen, held_out=True)
    return training, validation


def write_dataset(folder: Path) -> None:
    """Write ``train.jsonl`` and ``validation.jsonl`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    training, validation = make_records(make_world())
    for name, records in (("train", training), ("validation", validation)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_bytes(lines.encode("ascii"))


def _fill(
    world: World, rng: random.Random, count: int, seen: set[tuple[str, str]], *, held_out: bool
) -> list[Record]:
    """Return ``count`` new records, the categories in turn until one is exhausted, then the others."""
    makers: list[Callable[[World, random.Random, bool], Record]] = [_closed_book, _closed_qa, _classification]
    records: list[Record] = []
    while len(records) < count:
        maker = makers[len(records) % len(makers)]
        for _ in range(200):
            record = maker(world, rng, held_out)
            key = (record["instruction"], record["context"])
            if key not in seen:
                break
        else:
            makers.remove(maker)  # 45 people, five facts and three questions make 675 records, not 800
            continue
        seen.add(key)
        records.append(record)
    return records


def _closed_book(world: World, rng: random.Random, held_out: bool) -> Record:
    name = rng.choice([name for name in world.people if (name in world.held_out_people) == held_out])
    fact = rng.choice(facts_of(name, world))
    return _record(ask(fact, rng), "", answer(fact), "closed_book")


def _closed_qa(world: World, rng: random.Random, held_out: bool) -> Record:
    names = [name for name in world.strangers if (name in world.held_out_strangers) == held_out]
    facts = scene(rng.sample(names, 2), 2, rng)
    asked = rng.choice(facts)
    context = " ".join(tell(fact, rng) for fact in facts)
    return _record(ask(asked, rng), context, answer(asked), "closed_qa")


def _classification(world: World, rng: random.Random, held_out: bool) -> Record:
    words = [word for values in VALUES.values() for word in values]
    word = rng.choice([word for word in words if (word in world.held_out_words) == held_out])
    question, sentence = choice(word, rng)
    return _record(question, "", sentence, "classification")


def _record(instruction: str, context: str, response: str, category: str) -> Record:
    return {"instruction": instruction, "context": context, "response": response, "category": category}
