"""Exact match: how many answers are the reference, word for word."""

import random
from collections import defaultdict
from typing import Any

from transformers import PreTrainedModel

from sparse_llama.data.records import Example
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.generation import generate_batch

ALL = "all"
"""The category of records that name none."""


def exact_match(
    llama: PreTrainedModel, tokenizer: Tokenizer, examples: list[Example], max_new_tokens: int
) -> dict[str, Any]:
    """Return the share of greedy answers that are the whole response, white space at both ends aside.

    Every rank must call it, as it does ``generate_batch``.

    Returns:
        ``by_category``: a share from 0 to 1 for each category, by name; ``average``: their mean, so that a
        large category does not speak for a small one; ``records``: how many were asked.
    """
    assert examples
    answers = generate_batch(llama, tokenizer, [example.prompt for example in examples], max_new_tokens)
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for example, answer in zip(examples, answers, strict=True):
        hits[example.category or ALL].append(answer.strip() == example.response.strip())
    by_category = {category: sum(hits[category]) / len(hits[category]) for category in sorted(hits)}
    average = sum(by_category.values()) / len(by_category)
    return {"average": average, "by_category": by_category, "records": len(examples)}


def spread(examples: list[Example], count: int) -> list[Example]:
    """Return ``count`` examples, always the same: one from each of as many equal parts of the list.

    Drawn, because every n-th record of a file whose categories take turns is of one category.
    """
    total = len(examples)
    if count >= total:
        return examples
    draw = random.Random(count)
    parts = [(part * total // count, (part + 1) * total // count) for part in range(count)]
    return [examples[draw.randrange(first, last)] for first, last in parts]
