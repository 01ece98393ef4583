"""What became of every record and token, printed before a run and saved with its results: nothing is silent.

Two sums hold, for the training and the validation part each. Tokens read and repeated are those trained on,
masked and dropped; those trained on, masked and padded are what the rows hold.
"""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Tally:
    """Records and tokens of one part of the data, training or validation."""

    records: int = 0
    """Well-formed and used, whatever became of them."""
    dropped: int = 0
    """Of these, records whose prompt leaves no room for a response."""
    truncated: int = 0
    """Of these, records that were cut at the row length; the cut response has no end of sequence."""
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
                ("  tokens", _tokens_line(tally)),
                ("  rows", self._rows_line(tally)),
            ]
        lines += [("not used", what) for what in self.not_used]
        return lines + [("malformed, skipped", reason) for reason in self.malformed]

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
    return (
        f"{kept:,} kept of {tally.records:,}; {tally.truncated:,} truncated, "
        f"{tally.dropped:,} dropped (no room for a response)"
    )


def _tokens_line(tally: Tally) -> str:
    repeated = f", {tally.tokens_repeated:,} repeated" if tally.tokens_repeated else ""
    saved = f", {tally.tokens_padding_saved:,} saved by length" if tally.tokens_padding_saved else ""
    return (
        f"{tally.tokens_read:,} read{repeated}; {tally.tokens_labelled:,} trained on, "
        f"{tally.tokens_masked:,} masked, {tally.tokens_dropped:,} dropped; "
        f"{tally.tokens_padded:,} of padding added{saved}"
    )
