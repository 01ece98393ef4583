"""Examples to rows: encoded, laid out, and counted; everything about them that takes a tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from sparse_llama.config.settings import Settings
from sparse_llama.data.encode import encode_example
from sparse_llama.data.ledger import Tally
from sparse_llama.data.packing import Document, Row, one_per_row, pack
from sparse_llama.data.records import Example
from sparse_llama.data.tokenizer import Tokenizer
from sparse_llama.reporting.progress import count_through


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """One part of the data, training or validation, as rows; none where no record fits."""

    rows: list[Row]
    tally: Tally
    """Without the padding that micro-batches add."""
    fitting: list[int]
    """The examples that are in the rows, by number."""
    record_lengths: torch.Tensor
    """Tokens of every example before it was cut; int32."""


def make_rows(
    examples: Sequence[Example], tokenizer: Tokenizer, settings: Settings, align: int, console: Console
) -> EncodedRows:
    """Return ``examples`` as rows; ``align`` as ``prepare_data`` has it."""
    tally, documents = Tally(), list[Document]()
    fitting, lengths = list[int](), list[int]()
    counted = count_through(examples, len(examples), "tokenising", console)
    for number, example in enumerate(counted):
        read = tally.tokens_read
        pieces = encode_example(example, tokenizer, settings.seq_length, tally)
        lengths.append(tally.tokens_read - read)
        documents += pieces
        fitting += [number] if pieces else []
    if settings.data.packing:
        rows = pack(documents, row_length=settings.seq_length, align=align, seed=settings.seed)
    else:
        rows = one_per_row(documents)
    tally.rows = len(rows)
    tally.tokens_padded = sum(map(len, rows)) - tally.tokens_labelled - tally.tokens_masked
    return EncodedRows(rows, tally, fitting, torch.tensor(lengths, dtype=torch.int32))
