"""From a data set's name to batches: read, split, encode, pack, and keep account."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import random_split

from sparse_llama.config.settings import DataSettings, Settings
from sparse_llama.data.batches import Batch, Batches, validation_batches
from sparse_llama.data.encode import encode_example
from sparse_llama.data.ledger import Ledger, Tally
from sparse_llama.data.packing import Document, Row, one_per_row, pack
from sparse_llama.data.records import Example
from sparse_llama.data.sources import Found, open_source
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.errors import DataError

_DEFAULT_SHARE, _MOST_BY_DEFAULT = 20, 2000  # one record in 20 is split off, at most 2,000


@dataclass(frozen=True)
class PreparedData:
    """A run's data."""

    batches: Batches
    validation_batches: list[Batch]
    validation_examples: list[Example]
    """Those that fit a row, in the data set's order."""
    ledger: Ledger


def prepare_data(
    settings: Settings,
    tokenizer: Tokenizer,
    *,
    align: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> PreparedData:
    """Return the training and validation batches of one rank.

    Args:
        align: documents of a packed row start at its multiples: the block of a sparse layout, else 1.

    Raises:
        DataError: no such data set, too many malformed records, or nothing left to train or validate on.
    """
    data = settings.data
    ledger = Ledger(data.dataset, "", settings.seq_length, data.packing)
    training, held_out = _read(data, ledger)
    if data.max_records is not None:
        training = training[: data.max_records]

    def rows_of(examples: list[Example], tally: Tally) -> tuple[list[Row], list[Example]]:
        encoded = [encode_example(example, tokenizer, settings.seq_length, tally) for example in examples]
        rows = _rows([document for documents in encoded for document in documents], settings, align)
        filled = tally.tokens_labelled + tally.tokens_masked
        tally.rows, tally.tokens_padded = len(rows), sum(len(row.ids) for row in rows) - filled
        return rows, [example for example, documents in zip(examples, encoded, strict=True) if documents]

    training_rows, _ = rows_of(training, ledger.training)
    validation_rows, validation_examples = rows_of(held_out, ledger.validation)
    for name, rows in (("training", training_rows), ("validation", validation_rows)):
        if not rows:
            raise DataError(
                f"{data.dataset}: no {name} record fits {settings.seq_length} tokens with its prompt; "
                "use a longer sparse_llama.seq_length"
            )
    return PreparedData(
        Batches(
            training_rows,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            seed=settings.seed,
        ),
        validation_batches(
            validation_rows, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size
        ),
        validation_examples,
        ledger,
    )


def split_indices(num_records: int, num_held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the training and the validation records by number: ``random_split`` over file order.

    lit-llama's split of Dolly (``scripts/prepare_dolly.py``): 15,011 records, 2,000 held out, seed 42.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [num_records - num_held_out, num_held_out]
    training, held_out = random_split(range(num_records), lengths, generator=generator)  # type: ignore[arg-type]
    return list(training.indices), list(held_out.indices)


def _read(data: DataSettings, ledger: Ledger) -> tuple[list[Example], list[Example]]:
    """Return the training and the validation examples, and say in the ledger how they were told apart."""
    source = open_source(data.dataset)
    if data.validation is not None:
        other = open_source(data.validation)
        ledger.split = data.validation
        held_out = _take(other.training if other.validation is None else other.validation, data, ledger)
        return _non_empty(_take(source.training, data, ledger), data.dataset), _non_empty(
            held_out, data.validation
        )
    if source.validation is not None and data.validation_records is None:
        ledger.split = "the data set's own split"
        held_out = _non_empty(_take(source.validation, data, ledger), f"{data.dataset}, its validation split")
        return _non_empty(_take(source.training, data, ledger), data.dataset), held_out
    return _split(_non_empty(_take(source.training, data, ledger), data.dataset), data, ledger)


def _split(
    examples: list[Example], data: DataSettings, ledger: Ledger
) -> tuple[list[Example], list[Example]]:
    wanted = data.validation_records
    if wanted is None:
        wanted = min(max(1, len(examples) // _DEFAULT_SHARE), _MOST_BY_DEFAULT)
    if wanted >= len(examples):
        raise DataError(
            f"sparse_llama.data.validation_records: {wanted} of {len(examples)} records leave none to train "
            "on; use fewer, or name a validation set in sparse_llama.data.validation"
        )
    how = "" if data.validation_records is not None else ", the default"
    ledger.split = f"{wanted:,} of {len(examples):,} records, split off with seed {data.split_seed}{how}"
    training, held_out = split_indices(len(examples), wanted, data.split_seed)
    return [examples[index] for index in training], [examples[index] for index in held_out]


def _take(records: Iterator[Found], data: DataSettings, ledger: Ledger) -> list[Example]:
    """Return the well-formed examples; note the others, up to the limit."""
    examples: list[Example] = []
    for found in records:
        if found.example is not None:
            examples.append(found.example)
            continue
        ledger.malformed.append(f"{found.place}: {found.reason}")
        if len(ledger.malformed) > data.max_malformed:
            raise DataError(
                f"{ledger.malformed[0]}; that is the first of more than {data.max_malformed} malformed "
                f"records, the last is {found.place}; repair the data, or raise "
                "sparse_llama.data.max_malformed"
            )
    return examples


def _non_empty(examples: list[Example], name: str) -> list[Example]:
    if not examples:
        raise DataError(f"{name}: no records")
    return examples


def _rows(documents: list[Document], settings: Settings, align: int) -> list[Row]:
    if not settings.data.packing:
        return one_per_row(documents)
    return pack(documents, row_length=settings.seq_length, align=align, seed=settings.seed)
