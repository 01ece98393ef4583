"""Exact match: how many answers are the reference, word for word; and which records are asked."""

import random
from typing import Any

from transformers import PreTrainedModel

from sparse_llama.data.records import Example
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.evaluation.answers import answer_records, by_category


def exact_match(
    llama: PreTrainedModel, tokenizer: Tokenizer, examples: list[Example], max_new_tokens: int
) -> dict[str, Any]:
    """Return the share of greedy answers that are the whole response, white space at both ends aside, as
    ``by_category`` does.

    Every rank must call it, as it does ``generate_batch``.
    """
    answers = answer_records(llama, tokenizer, examples, max_new_tokens)
    return by_category(answers, lambda answer: answer.exact)


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
