"""What became of every record and token; printed before a run and saved with its results. Nothing is
silent."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Tally:
    """Records and tokens of one part of the data, training or validation."""

    records: int = 0
    """Well-formed, whatever became of them."""
    dropped: int = 0
    """Of these, records whose prompt leaves no room for a response."""
    truncated: int = 0
    """Of these, records that were cut at the row length; the cut response has no end of sequence."""
    tokens_read: int = 0
    """Of all records, begin and end of sequence included."""
    tokens_dropped: int = 0
    """Of dropped records, and cut off."""
    tokens_labelled: int = 0
    """That train; of a text's pieces, the token that leads over from one to the next is counted once."""
    tokens_masked: int = 0
    """Prompts, and first tokens of documents."""
    tokens_padded: int = 0
    """Between documents and behind the last one of a row."""
    rows: int = 0


@dataclass
class Ledger:
    """The account of a run's data."""

    dataset: str
    split: str
    """Where the validation records come from."""
    row_length: int
    is_packed: bool
    training: Tally = field(default_factory=Tally)
    validation: Tally = field(default_factory=Tally)
    malformed: list[str] = field(default_factory=list)
    """Where, and why, for each record that was skipped."""

    def rows(self) -> list[tuple[str, str]]:
        """Return the account as label and value."""
        lines = [("validation", self.split)]
        for name, tally in (("training", self.training), ("validation", self.validation)):
            lines.append((f"{name} records", _records_line(tally)))
            lines.append((f"{name} tokens", _tokens_line(tally)))
            lines.append((f"{name} rows", self._rows_line(tally)))
        lines += [("malformed, skipped", reason) for reason in self.malformed]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the account as JSON holds it."""
        return asdict(self)

    def _rows_line(self, tally: Tally) -> str:
        if not self.is_packed:
            return f"{tally.rows:,} of one document each, padded to the longest of their micro-batch"
        filled = tally.tokens_labelled + tally.tokens_masked
        share = filled / max(filled + tally.tokens_padded, 1)
        return f"{tally.rows:,} of {self.row_length:,} tokens, {100 * share:.1f}% filled"


def _records_line(tally: Tally) -> str:
    kept = tally.records - tally.dropped
    return (
        f"{kept:,} kept of {tally.records:,}; {tally.truncated:,} truncated, "
        f"{tally.dropped:,} dropped (no room for a response)"
    )


def _tokens_line(tally: Tally) -> str:
    return (
        f"{tally.tokens_read:,} read; {tally.tokens_labelled:,} trained on, {tally.tokens_masked:,} masked, "
        f"{tally.tokens_dropped:,} dropped, {tally.tokens_padded:,} padding added"
    )
