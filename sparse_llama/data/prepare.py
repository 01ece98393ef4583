"""From a data set's name to batches: read, split, encode, pack, and keep account."""

from dataclasses import dataclass

from sparse_llama.config.settings import Settings
from sparse_llama.data.batches import (
    WHOLE,
    Batch,
    Batches,
    Shard,
    by_length,
    count_padding,
    validation_batches,
)
from sparse_llama.data.encode import encode_example
from sparse_llama.data.ledger import Ledger, Tally
from sparse_llama.data.packing import Document, Row, one_per_row, pack
from sparse_llama.data.records import Example
from sparse_llama.data.split import read_examples
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.errors import DataError


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
    accumulation: int = 1,
    rank: int,
    world_size: int,
    shard: Shard = WHOLE,
) -> PreparedData:
    """Return the training and validation batches of one rank.

    Args:
        align: documents of a packed row start at its multiples: the block of a sparse layout, else 1.
        accumulation: micro-batches of a step on each rank; what ``group_by_length`` saves depends on it.
        rank, world_size: of the processes that read different rows.
        shard: what this process holds of each row that it reads.

    Raises:
        DataError: no such data set, too many malformed records, or nothing left to train or validate on.
    """
    ledger = Ledger(settings.seq_length, settings.data.packing)
    is_grouped = settings.data.group_by_length and not settings.data.packing
    training, held_out = read_examples(settings.data, ledger)
    rows, _ = _encode(training, tokenizer, settings, align, ledger.training, "training")
    batches = Batches(
        rows,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        seed=settings.seed,
        shard=shard,
        group_by_length=is_grouped,
    )
    padded, as_drawn = (batches.count_padding(accumulation, as_drawn=drawn) for drawn in (False, True))
    ledger.training.tokens_padded += padded
    ledger.training.tokens_padding_saved = as_drawn - padded
    rows, fitting = _encode(held_out, tokenizer, settings, align, ledger.validation, "validation")
    as_drawn = count_padding(rows, micro_batch_size, shard.count)
    rows = by_length(rows) if is_grouped else rows
    padded = count_padding(rows, micro_batch_size, shard.count)
    ledger.validation.tokens_padded += padded
    ledger.validation.tokens_padding_saved = as_drawn - padded
    held_out_batches = validation_batches(
        rows, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size, shard=shard
    )
    return PreparedData(batches, held_out_batches, fitting, ledger)


def _encode(
    examples: list[Example], tokenizer: Tokenizer, settings: Settings, align: int, tally: Tally, name: str
) -> tuple[list[Row], list[Example]]:
    """Return the rows of ``examples``, and those examples that are in them."""
    documents: list[Document] = []
    fitting: list[Example] = []
    for example in examples:
        pieces = encode_example(example, tokenizer, settings.seq_length, tally)
        documents += pieces
        fitting += [example] if pieces else []
    if not documents:
        raise DataError(
            f"{settings.data.dataset}: no {name} record leaves room for a response in {settings.seq_length} "
            "tokens; use a longer sparse_llama.seq_length"
        )
    if settings.data.packing:
        rows = pack(documents, row_length=settings.seq_length, align=align, seed=settings.seed)
    else:
        rows = one_per_row(documents)
    tally.rows = len(rows)
    tally.tokens_padded = sum(map(len, rows)) - tally.tokens_labelled - tally.tokens_masked
    return rows, fitting
