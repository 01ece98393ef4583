"""Records of local files, each with the place it stands at."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sparse_llama.config.section import show, show_plain
from sparse_llama.data.records import Example, MalformedRecordError, parse_record, plain_text
from sparse_llama.errors import DataError

_MAX_FIELD_BYTES = 2**31 - 1  # csv's own limit is 128 KiB: a long document is more
_GAP = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Found:
    """A record, or why there is none."""

    place: str
    """``FILE, line 7``, its first; ``FILE, record 0`` where there are no lines."""
    example: Example | None
    reason: str = ""


def read_file(path: Path) -> Iterator[Found]:
    """Yield the records of one file in its order.

    Raises:
        DataError: of no known kind, or damaged as a whole.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot be read as data; expected {', '.join(sorted(READERS))}")
    return reader(path)


def parse_found(place: str, record: object) -> Found:
    """Return what ``record`` says, or what is wrong with it."""
    try:
        return Found(place, parse_record(record))
    except MalformedRecordError as error:
        return Found(place, None, str(error))


def take_examples(records: Iterable[Found], malformed: list[str], limit: int, remedy: str) -> list[Example]:
    """Return the well-formed examples; add where and why to ``malformed`` for each of the others.

    Args:
        limit: how many malformed records there may be.
        remedy: what to do about more of them.

    Raises:
        DataError: there are more.
    """
    examples: list[Example] = []
    for found in records:
        if found.example is not None:
            examples.append(found.example)
            continue
        malformed.append(f"{found.place}: {found.reason}")
        if len(malformed) > limit:
            raise DataError(
                f"{malformed[0]}; that is the first of more than {limit} malformed records, the last is "
                f"{found.place}; {remedy}"
            )
    return examples


def _read_jsonl(path: Path) -> Iterator[Found]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield Found(place, None, f"not UTF-8 text (byte {error.start + 1} of the line)")
            except (ValueError, RecursionError) as error:
                yield Found(place, None, f"not JSON ({str(error).split(': line', 1)[0]})")
            else:
                yield parse_found(place, record)


def _read_json(path: Path) -> Iterator[Found]:
    try:
        for line, record in _elements(_read_text(path)):
            yield parse_found(f"{path}, line {line}", record)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not a JSON list of records ({error}); one object a line is .jsonl"
        ) from error


def _elements(text: str) -> Iterator[tuple[int, object]]:
    """Yield the elements of a JSON list, each with the line that it begins on."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    place = _skip_gap(text, _expect(text, _skip_gap(text, 0), "["))
    is_first = True
    while text[place : place + 1] != "]":
        if not is_first:
            place = _skip_gap(text, _expect(text, place, ","))
        line, counted = line + text.count("\n", counted, place), place
        record, place = decoder.raw_decode(text, place)
        yield line, record
        place, is_first = _skip_gap(text, place), False
    end = _skip_gap(text, place + 1)
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _skip_gap(text: str, place: int) -> int:
    gap = _GAP.match(text, place)
    return place if gap is None else gap.end()


def _expect(text: str, place: int, mark: str) -> int:
    if text[place : place + 1] != mark:
        raise json.JSONDecodeError(f"Expecting {mark!r}", text, place)
    return place + 1


def _read_csv(path: Path) -> Iterator[Found]:
    previous = csv.field_size_limit(_MAX_FIELD_BYTES)
    try:
        # bytes that are no UTF-8 become surrogates, which the record's own check refuses: one record is lost
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _csv_rows(path, file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    finally:
        csv.field_size_limit(previous)


def _csv_rows(path: Path, file: IO[str]) -> Iterator[Found]:
    rows = csv.reader(file, strict=True)  # else a quote that is never closed takes in the rest of the file
    header: list[str] | None = None
    line = 1
    try:
        for row in rows:
            place, line = f"{path}, line {line}", rows.line_num + 1
            if not row:
                continue
            if header is None:
                header = _checked_header(place, row)
            elif len(row) != len(header):
                yield Found(place, None, f"has {len(row)} fields, the header {len(header)}")
            else:
                yield parse_found(place, dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: not CSV ({error})") from error


def _checked_header(place: str, header: list[str]) -> list[str]:
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{place}: has two columns called {show(name)}; keep one of them")
    return header


def _read_parquet(path: Path) -> Iterator[Found]:
    import pyarrow
    import pyarrow.parquet  # comes with datasets; 0.3 s to import

    number = 0
    try:
        # checksums are optional in the format: where pages have them, flipped bits are found
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in _records_of(batch):
                    place = f"{path}, record {number}"
                    is_read = not isinstance(record, Exception)
                    yield parse_found(place, record) if is_read else Found(place, None, _unreadable(record))
                    number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = show_plain(str(error))
        raise DataError(f"{path}: not a complete Parquet file ({reason}); copy it again") from error


def _records_of(batch: Any) -> list[Any]:
    """Return the records of an Arrow batch; in place of one with a value that Python cannot hold, the error:
    Arrow stores bytes that are no UTF-8 as text, and times beyond the year 9999."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        pass
    found: list[Any] = []
    for number in range(len(batch)):
        try:
            found += batch.slice(number, 1).to_pylist()
        except (ValueError, OverflowError) as error:
            found.append(error)
    return found


def _unreadable(error: Exception) -> str:
    return "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else show_plain(str(error))


def _read_txt(path: Path) -> Iterator[Found]:
    text = _read_text(path)
    if text.strip():
        yield Found(str(path), plain_text(text))


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _read_text(path: Path) -> str:
    with _open(path) as file:
        content: bytes = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text; convert the file") from error


READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
