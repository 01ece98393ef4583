"""Where records come from: bundled data, local files and folders, data sets on the hub. No data set's code
runs.

A ``.txt`` file is one document, whatever its blank lines mean. A folder holds files of training records, and
may hold files of validation records, which are told apart by their names (``VALIDATION_NAMES``).
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_llama.config.bundled import resolve_bundled
from sparse_llama.data.records import Example, MalformedRecordError, parse_record, plain_text
from sparse_llama.errors import DataError

VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")
_MAX_FIELD_BYTES = 2**31 - 1  # csv's own limit is 128 KiB: a long document is more


@dataclass(frozen=True)
class Found:
    """A record, or why there is none; ``place`` says where, as ``file, line 7``."""

    place: str
    example: Example | None
    reason: str = ""


@dataclass(frozen=True)
class Source:
    """A data set: its records in order, and those it sets apart for validation itself."""

    training: Iterator[Found]
    validation: Iterator[Found] | None


def open_source(name: str) -> Source:
    """Return the records of ``bundled:NAME``, a file, a folder or a hub id; nothing is read yet.

    Raises:
        DataError: there is no such data set, or no way to read it.
    """
    path = resolve_bundled(name) or Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        return Source(read_file(path), None)
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")
    if not is_hub_id or path.suffix.lower() in _READERS:
        raise DataError(f"{name}: no such file or folder; give a file, a folder, or a hub id (owner/name)")
    return _open_hub(name)


def read_file(path: Path) -> Iterator[Found]:
    """Yield the records of one file in its order.

    Raises:
        DataError: of no known kind, or damaged as a whole.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot be read as data; expected {', '.join(sorted(_READERS))}")
    return reader(path)


def _open_folder(folder: Path) -> Source:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _READERS)
    held_out = [path for path in files if _is_validation(path.stem)]
    training = [path for path in files if path not in held_out]
    if not training:
        raise DataError(
            f"{folder}: no training file; expected train.jsonl or others of {', '.join(sorted(_READERS))}"
        )
    return Source(_chain(training), _chain(held_out) if held_out else None)


def _is_validation(name: str) -> bool:
    return re.split(r"[^a-z]", name.lower(), maxsplit=1)[0] in VALIDATION_NAMES


def _chain(files: list[Path]) -> Iterator[Found]:
    for path in files:
        yield from read_file(path)


def _open_hub(name: str) -> Source:
    from datasets import load_dataset  # 2 s to import, and files need none of it

    try:
        splits: Any = load_dataset(name)
    except (OSError, ValueError, ImportError) as error:  # the hub's errors are one of these
        reason = str(error).strip().split("\n", 1)[0]
        raise DataError(
            f"{name}: no such file, and not available from the hub ({type(error).__name__}: {reason}); "
            "check the name and the network, or give a local file"
        ) from error
    if "train" not in splits and len(splits) > 1:
        raise DataError(f"{name}: its splits are {', '.join(splits)}; none is called train")
    training = splits["train"] if "train" in splits else next(iter(splits.values()))
    held_out = next((splits[split] for split in splits if _is_validation(split)), None)
    if held_out is training:
        held_out = None
    return Source(_hub_rows(name, training), None if held_out is None else _hub_rows(name, held_out))


def _hub_rows(name: str, split: Any) -> Iterator[Found]:
    for number, record in enumerate(split):
        yield _found(f"{name}, record {number}", lambda record=record: parse_record(record))


def _read_jsonl(path: Path) -> Iterator[Found]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _found(f"{path}, line {number}", lambda line=line: parse_record(_parse_line(line)))


def _parse_line(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise MalformedRecordError(f"not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise MalformedRecordError(f"not JSON ({str(error).split(': line', 1)[0]})") from error


def _read_json(path: Path) -> Iterator[Found]:
    text = _read_text(path)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); one object a line is .jsonl") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: holds a {type(records).__name__}; expected a list of records")
    for number, record in enumerate(records):
        yield _found(f"{path}, record {number}", lambda record=record: parse_record(record))


def _read_csv(path: Path) -> Iterator[Found]:
    previous = csv.field_size_limit(_MAX_FIELD_BYTES)
    try:
        # bytes that are no UTF-8 become surrogates, which the record's own check refuses: one record is lost
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, restkey="(more)")
            try:
                for row in reader:
                    record = {key: value for key, value in row.items() if value is not None}
                    yield _found(
                        f"{path}, line {reader.line_num}", lambda record=record: parse_record(_whole(record))
                    )
            except csv.Error as error:
                raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    finally:
        csv.field_size_limit(previous)


def _whole(record: dict[str, Any]) -> dict[str, Any]:
    if "(more)" in record:
        raise MalformedRecordError(f"has {len(record['(more)'])} fields more than the header")
    return record


def _read_parquet(path: Path) -> Iterator[Found]:
    import pyarrow
    import pyarrow.parquet  # comes with datasets; 0.3 s to import

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    yield _found(f"{path}, record {number}", lambda record=record: parse_record(record))
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a complete Parquet file ({str(error).splitlines()[0]})") from error


def _read_txt(path: Path) -> Iterator[Found]:
    text = _read_text(path)
    if text.strip():
        yield Found(str(path), plain_text(text))


def _found(place: str, parse: Callable[[], Example]) -> Found:
    try:
        return Found(place, parse())
    except MalformedRecordError as error:
        return Found(place, None, str(error))


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


_READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
