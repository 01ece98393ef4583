"""From a data set's name to batches: read, split, encode once, and keep account."""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from rich.console import Console

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
from sparse_llama.data.cache import RowCache, open_cache, rows_key
from sparse_llama.data.ledger import Ledger, Tally, describe_lengths
from sparse_llama.data.records import Example
from sparse_llama.data.rows import EncodedRows, make_rows
from sparse_llama.data.split import read_examples
from sparse_llama.data.template import template_of
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.distributed import ranks
from sparse_llama.errors import DataError


@dataclass(frozen=True)
class PreparedData:
    """A run's data."""

    batches: Batches
    validation_batches: list[Batch]
    validation_examples: list[Example]
    """Those that fit a row, in the data set's order."""
    ledger: Ledger
    record_lengths: torch.Tensor
    """Tokens of every training record before it was cut; int32."""


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
    console: Console | None = None,
) -> PreparedData:
    """Return the training and validation batches of one rank; all ranks must call it.

    Args:
        tokenizer: with the template of ``settings``.
        align: documents of a packed row start at its multiples: the block of a sparse layout, else 1.
        accumulation: micro-batches of a step on each rank; what ``group_by_length`` saves depends on it.
        rank, world_size: of the processes that read different rows.
        shard: what this process holds of each row that it reads.
        console: where to say what takes long; None is nowhere.

    Raises:
        DataError: no such data set, too many malformed records, or nothing left to train or validate on.
    """
    assert template_of(tokenizer) == settings.data.template
    ledger = Ledger(settings.seq_length, settings.data.packing)
    is_grouped = settings.data.group_by_length and not settings.data.packing
    training, held_out = read_examples(settings.data, ledger, tokenizer)
    console = console or Console(quiet=True)
    encoder = _Encoder(tokenizer, settings, align, open_cache(settings.data, console), console)
    encoded = encoder.rows_of(training, "training")
    ledger.training, lengths = _described(encoded, training), encoded.record_lengths
    batches = Batches(
        encoded.rows,
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
    encoded = encoder.rows_of(held_out, "validation")
    ledger.validation = _described(encoded, held_out)
    as_drawn = count_padding(encoded.rows, micro_batch_size, shard.count)
    rows = by_length(encoded.rows) if is_grouped else encoded.rows
    padded = count_padding(rows, micro_batch_size, shard.count)
    ledger.validation.tokens_padded += padded
    ledger.validation.tokens_padding_saved = as_drawn - padded
    held_out_batches = validation_batches(
        rows, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size, shard=shard
    )
    fitting = [held_out[number] for number in encoded.fitting]
    return PreparedData(batches, held_out_batches, fitting, ledger, lengths)


def _described(encoded: EncodedRows, examples: list[Example]) -> Tally:
    """Return the account of the rows with what is known of their records."""
    named = Counter(example.category for example in examples if example.category is not None)
    return replace(
        encoded.tally, lengths=describe_lengths(encoded.record_lengths), categories=dict(named.most_common())
    )


@dataclass(frozen=True)
class _Encoder:
    """What makes rows of examples, once for all ranks of a host and all runs."""

    tokenizer: Tokenizer
    settings: Settings
    align: int
    cache: RowCache | None
    console: Console

    def rows_of(self, examples: list[Example], name: str) -> EncodedRows:
        """Return the rows of the part called ``name``, from the cache if they are there; all ranks must call
        it."""
        encoded = self._make(examples) if self.cache is None else self._find(examples, self.cache)
        if not encoded.rows:
            length = self.settings.seq_length
            raise DataError(
                f"{self.settings.data.dataset}: no {name} record leaves room for a response in {length} "
                "tokens; use a longer sparse_llama.seq_length"
            )
        return encoded

    def _find(self, examples: list[Example], cache: RowCache) -> EncodedRows:
        key = rows_key(examples, self.tokenizer, self.settings, self.align)
        with ranks.main_first():
            # one process of a host reads all of the file, the others trust it
            encoded = cache.load(key, is_verified=ranks.local_rank() == 0)
            if encoded is None:
                made = self._make(examples)
                cache.store(key, made)
                encoded = cache.load(key, is_verified=False) or made  # mapped, which leaves memory to others
            return encoded

    def _make(self, examples: list[Example]) -> EncodedRows:
        return make_rows(examples, self.tokenizer, self.settings, self.align, self.console)
