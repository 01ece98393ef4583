"""What became of every record and token, printed before a run and saved with its results: nothing is silent.

Two sums hold, for the training and the validation part each. Tokens read and repeated are those trained on,
masked and dropped; those trained on, masked and padded are what the rows hold.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

_MOST_LOST = 0.05  # of the records of a part
_MOST_CATEGORIES = 8  # in a table; summary.json has all


@dataclass
class Tally:
    """Records and tokens of one part of the data, training or validation."""

    records: int = 0
    """Well-formed and used, whatever became of them."""
    dropped: int = 0
    """Of these, records whose prompt leaves no room for a response."""
    truncated: int = 0
    """Of these, records that were cut at the row length; the cut response has no end of sequence."""
    texts_cut: int = 0
    """Of these, plain texts that were cut into pieces, of which nothing is lost."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Tokens of the records before they were cut: ``p50``, ``p90``, ``p99`` and ``max``."""
    categories: dict[str, int] = field(default_factory=dict)
    """Records by the category that they name, the most frequent first."""
    tokens_read: int = 0
    """Of all records, begin and end of sequence included."""
    tokens_repeated: int = 0
    """The last tokens of pieces of a text, from which the next pieces go on."""
    tokens_dropped: int = 0
    """Of dropped records, and cut off."""
    tokens_labelled: int = 0
    """That train."""
    tokens_masked: int = 0
    """Prompts, and first tokens of documents."""
    tokens_padded: int = 0
    """Between documents, behind the last one of a row, behind rows shorter than others of a micro-batch."""
    tokens_padding_saved: int = 0
    """That would have been padded without ``group_by_length``."""
    rows: int = 0
    longest_document: int = 0
    """Its tokens."""


def describe_lengths(lengths: torch.Tensor) -> dict[str, int]:
    """Return percentiles of the records' tokens, each the least length that this share does not exceed."""
    ordered = lengths.sort().values
    ranks = {f"p{share}": -(-share * len(ordered) // 100) - 1 for share in (50, 90, 99)}
    return {name: int(ordered[rank]) for name, rank in ranks.items()} | {"max": int(ordered[-1])}


@dataclass
class Ledger:
    """The account of a run's data."""

    row_length: int
    is_packed: bool
    training_source: str = ""
    validation_source: str = ""
    not_used: list[str] = field(default_factory=list)
    """Files, splits, records and keys that are there and have no part in the run."""
    malformed: list[str] = field(default_factory=list)
    """Where, and why, for each record that was skipped."""
    training: Tally = field(default_factory=Tally)
    validation: Tally = field(default_factory=Tally)

    def rows(self) -> list[tuple[str, str]]:
        """Return the account as label and value."""
        lines: list[tuple[str, str]] = []
        for name, source, tally in (
            ("training", self.training_source, self.training),
            ("validation", self.validation_source, self.validation),
        ):
            lines += [
                (name, source),
                ("  records", _records_line(tally)),
                *([("  categories", _categories_line(tally.categories))] if tally.categories else []),
                *([("  lengths", _lengths_line(tally.lengths))] if tally.lengths else []),
                ("  tokens", _tokens_line(tally)),
                ("  rows", self._rows_line(tally)),
            ]
        lines += [("not used", what) for what in self.not_used]
        return lines + [("malformed, skipped", reason) for reason in self.malformed]

    def warnings(self) -> list[str]:
        """Return a line for each part of which too much is lost."""
        found = []
        for name, tally in (("training", self.training), ("validation", self.validation)):
            lost = tally.truncated + tally.dropped
            if lost > _MOST_LOST * tally.records:
                found.append(
                    f"{lost:,} of {tally.records:,} {name} records ({100 * lost / tally.records:.0f}%) are "
                    f"longer than {self.row_length:,} tokens: {tally.truncated:,} lose their ends, "
                    f"{tally.dropped:,} are dropped; use a longer sparse_llama.seq_length"
                )
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the account as JSON holds it."""
        return asdict(self)

    def _rows_line(self, tally: Tally) -> str:
        filled = tally.tokens_labelled + tally.tokens_masked
        share = f"{100 * filled / max(filled + tally.tokens_padded, 1):.1f}% filled"
        if self.is_packed:
            return f"{tally.rows:,} of {self.row_length:,} tokens, {share}"
        return f"{tally.rows:,} of one document, padded to the longest of their micro-batch, {share}"


def _records_line(tally: Tally) -> str:
    kept = tally.records - tally.dropped
    pieces = f", {tally.texts_cut:,} texts cut into pieces" if tally.texts_cut else ""
    return (
        f"{kept:,} kept of {tally.records:,}; {tally.truncated:,} truncated, "
        f"{tally.dropped:,} dropped (no room for a response){pieces}"
    )


def _categories_line(categories: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(categories.items())[:_MOST_CATEGORIES]]
    left = len(categories) - len(shown)
    return ", ".join(shown) + (f" and {left} more" if left else "")


def _lengths_line(lengths: dict[str, int]) -> str:
    return (
        f"{lengths['p50']:,} tokens at the median, {lengths['p90']:,} at 90%, {lengths['p99']:,} at 99%, "
        f"{lengths['max']:,} at most"
    )


def _tokens_line(tally: Tally) -> str:
    repeated = f", {tally.tokens_repeated:,} repeated" if tally.tokens_repeated else ""
    saved = f", {tally.tokens_padding_saved:,} saved by length" if tally.tokens_padding_saved else ""
    return (
        f"{tally.tokens_read:,} read{repeated}; {tally.tokens_labelled:,} trained on, "
        f"{tally.tokens_masked:,} masked, {tally.tokens_dropped:,} dropped; "
        f"{tally.tokens_padded:,} of padding added{saved}"
    )
