"""Answers to held-out records: beside their references, scored one by one and by category."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sparse_llama.data.records import Example
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.errors import ConfigError
from sparse_llama.evaluation.rouge import rouge_l
from sparse_llama.generation import generate_batch

ALL = "all"
"""The category of records that name none."""
_KEYS = ("prompt", "reference", "answer", "category", "exact", "rouge_l")


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt, and what the record says."""

    prompt: str
    reference: str
    text: str
    category: str = ALL

    @property
    def exact(self) -> bool:
        """Whether it is the reference to the letter, white space at both ends aside."""
        return self.text.strip() == self.reference.strip()

    @property
    def rouge_l(self) -> float:
        return rouge_l(self.reference, self.text)


def answer_records(
    llama: PreTrainedModel, tokenizer: Tokenizer, examples: Sequence[Example], max_new_tokens: int
) -> list[Answer]:
    """Return the greedy answer to every example's prompt.

    Every rank must call it, as it does ``generate_batch``.
    """
    texts = generate_batch(llama, tokenizer, [example.prompt for example in examples], max_new_tokens)
    return [
        Answer(example.prompt, example.response, text, example.category or ALL)
        for example, text in zip(examples, texts, strict=True)
    ]


def by_category(answers: Sequence[Answer], score: Callable[[Answer], float]) -> dict[str, Any]:
    """Return the mean ``score`` of answers, category by category.

    Returns:
        ``by_category``: a mean from 0 to 1 for each category, by name; ``average``: their mean, so that a
        large category does not speak for a small one; ``records``: how many were asked.
    """
    assert answers
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for answer in answers:
        scores[answer.category].append(score(answer))
    means = {category: sum(scores[category]) / len(scores[category]) for category in sorted(scores)}
    return {"average": sum(means.values()) / len(means), "by_category": means, "records": len(answers)}


def check_answers_file(flag: str, file: Path) -> None:
    """Raise ConfigError, naming ``flag``, if ``file`` is there and holds something else than answers."""
    if not file.exists():
        return
    try:
        with file.open(encoding="utf-8") as lines:
            line = lines.readline()
        is_ours = not line or tuple(json.loads(line)) == _KEYS
    except (OSError, ValueError, TypeError):  # not readable, no JSON, or a number, which has no keys
        is_ours = False
    if not is_ours:
        raise ConfigError(
            f"{flag} {file}: holds something else than answers, which would be lost; name another file"
        )


def write_answers(file: Path, answers: Sequence[Answer]) -> None:
    """Write a JSON object a line, in one rename, so that a reader never sees half a file."""
    unfinished = file.with_name(f"{file.name}.tmp")
    with unfinished.open("w", encoding="utf-8") as lines:
        for answer in answers:
            values = (answer.prompt, answer.reference, answer.text, answer.category)
            record = dict(zip(_KEYS, (*values, answer.exact, answer.rouge_l), strict=True))
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    unfinished.replace(file)
