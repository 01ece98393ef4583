"""Which records train and which validate.

In this order: what ``sparse_llama.data.validation`` names, the data set's own split, or records split off:
``validation_records`` of them, else one in 20 and at most 2,000. Of a data set that is a single text, it is
the last twentieth.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import random_split

from sparse_llama.config.settings import DataSettings
from sparse_llama.data.files import Found, take_examples
from sparse_llama.data.ledger import Ledger
from sparse_llama.data.records import Example, plain_text
from sparse_llama.data.sources import open_source
from sparse_llama.data.template import write_records
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.errors import DataError

_PARTS, _MOST_BY_DEFAULT = 20, 2000
_KEY = "sparse_llama.data.validation_records"


def read_examples(
    data: DataSettings, ledger: Ledger, tokenizer: Tokenizer | None = None
) -> tuple[list[Example], list[Example]]:
    """Return the training and the validation examples in the template of ``tokenizer``, None is Alpaca's;
    the ledger says how they were told apart.

    Raises:
        DataError: no such data set, too many malformed records, or nothing left of a part.
    """
    own_split = data.validation_split if data.validation is None else None
    source = open_source(data.dataset, training_split=data.training_split, validation_split=own_split)
    other = None
    if data.validation is not None:
        other = open_source(data.validation, validation_split=data.validation_split)
    ledger.training_source, ledger.not_used = source.training_name, list(source.not_used)
    training = _take(source.training, source.training_name, data, ledger, tokenizer)
    chosen = source if other is None else other
    if chosen.validation is not None:
        ledger.validation_source = chosen.validation_name
        held_out = _take(chosen.validation, chosen.validation_name, data, ledger, tokenizer)
    elif other is not None:
        ledger.validation_source = other.training_name
        held_out = _take(other.training, other.training_name, data, ledger, tokenizer)
    else:
        training, held_out = _split(training, data, ledger)
    if other is not None and source.validation is not None:
        ledger.not_used.append(source.validation_name)
    if other is None and source.validation is not None and data.validation_records is not None:
        ledger.not_used.append(f"{_KEY}: the data set brings validation records of its own")
    if data.max_records is not None and data.max_records < len(training):
        left = len(training) - data.max_records
        ledger.not_used.append(f"{left:,} training records beyond sparse_llama.data.max_records")
        training = training[: data.max_records]
    return training, held_out


def split_indices(num_records: int, num_held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the training and the validation records by number: ``random_split`` over file order.

    lit-llama's split of Dolly (``scripts/prepare_dolly.py``): 15,011 records, 2,000 held out, seed 42.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [num_records - num_held_out, num_held_out]
    training, held_out = random_split(range(num_records), lengths, generator=generator)  # type: ignore[arg-type]
    return list(training.indices), list(held_out.indices)


def _split(
    examples: list[Example], data: DataSettings, ledger: Ledger
) -> tuple[list[Example], list[Example]]:
    if len(examples) == 1 and not examples[0].prompt and data.validation_records is None:
        ledger.validation_source = f"the last {100 // _PARTS}% of the text, the default"
        return _split_text(examples[0].response, data.dataset)
    wanted = data.validation_records
    if wanted is None:
        wanted = min(max(1, len(examples) // _PARTS), _MOST_BY_DEFAULT)
    if wanted >= len(examples):
        raise DataError(
            f"{_KEY}: {wanted} of {len(examples)} records of {data.dataset} leave none to train on; use "
            "fewer, or name a validation set in sparse_llama.data.validation"
        )
    how = ", the default" if data.validation_records is None else ""
    ledger.validation_source = (
        f"{wanted:,} of {len(examples):,} records, split off with seed {data.split_seed}{how}"
    )
    training, held_out = split_indices(len(examples), wanted, data.split_seed)
    return [examples[index] for index in training], [examples[index] for index in held_out]


def _split_text(text: str, name: str) -> tuple[list[Example], list[Example]]:
    """Cut behind the last line that ends before the last twentieth, or behind the last space."""
    place = len(text) - len(text) // _PARTS
    cut = 1 + max(text.rfind("\n", 0, place), -1)
    if not text[:cut].strip():
        cut = 1 + text.rfind(" ", 0, place)
    if not text[:cut].strip():
        raise DataError(
            f"{name}: one text of {len(text)} characters is too short to hold some of it back; name a "
            "validation set in sparse_llama.data.validation"
        )
    return [plain_text(text[:cut])], [plain_text(text[cut:])]


def _take(
    records: Iterator[Found], name: str, data: DataSettings, ledger: Ledger, tokenizer: Tokenizer | None
) -> list[Example]:
    """Return the well-formed examples; note the others, up to the limit."""
    remedy, known = "repair the data, or raise sparse_llama.data.max_malformed", len(ledger.malformed)
    examples = take_examples(write_records(records, tokenizer), ledger.malformed, data.max_malformed, remedy)
    if not examples:
        lost = ledger.malformed[known:]
        raise DataError(
            f"{name}: no records" + (f"; {len(lost)} are malformed, first {lost[0]}" if lost else "")
        )
    return examples
