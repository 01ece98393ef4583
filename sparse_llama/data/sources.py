"""Where records come from: bundled data, local files and folders, data sets on the hub. No data set's code
runs.

A ``.txt`` file is one document, whatever its blank lines mean. The files of a folder are told apart by the
first word of their names: ``train`` trains, ``validation`` (or another of ``VALIDATION_NAMES``) validates,
``test`` validates where nothing else does and never trains. Files of other names train where none is called
``train``. The splits of a data set on the hub have the same names. Where a data set's names say something
else, they can be given: splits of the hub, files by their names without ending.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_llama.config.bundled import resolve_bundled
from sparse_llama.config.paths import expand, is_file, is_folder, without_secrets
from sparse_llama.config.section import show
from sparse_llama.data.files import READERS, Found, parse_found, read_file
from sparse_llama.errors import DataError

VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")
_TRAIN, _TEST = "train", "test"
_KEYS = {True: "sparse_llama.data.training_split", False: "sparse_llama.data.validation_split"}


@dataclass(frozen=True)
class Source:
    """A data set: its records in order, and those it sets apart for validation itself."""

    training: Iterator[Found]
    training_name: str
    validation: Iterator[Found] | None = None
    validation_name: str = ""
    not_used: tuple[str, ...] = ()
    """Files or splits that neither train nor validate."""


def open_source(
    name: str, *, training_split: str | None = None, validation_split: str | None = None
) -> Source:
    """Return the records of ``bundled:NAME``, a file, a folder or a hub id; files are not read yet.

    Args:
        training_split, validation_split: a hub data set's splits by name, a folder's files by name without
            ending; None is told apart by the words in the module's docstring.

    Raises:
        DataError: there is no such data set or split, or no way to read it.
    """
    path = resolve_bundled(name) or expand(name)
    asked = (training_split, validation_split)
    if is_folder(path):
        return _open_folder(name, path, asked)
    if is_file(path):
        _choose(name, [path.stem], training_split, is_training=True)
        _choose(name, [], validation_split, is_training=False)  # all of it trains, or is split by number
        return Source(read_file(path), name)
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")
    if not is_hub_id or path.suffix.lower() in READERS:
        shown = without_secrets(name)
        raise DataError(f"{shown}: no such file or folder; give a file, a folder, or a hub id (owner/name)")
    return _open_hub(name, asked)


def _open_folder(name: str, folder: Path, asked: tuple[str | None, str | None]) -> Source:
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{name}: the folder cannot be read ({error.strerror})") from error
    files = {path.name: path for path in found if path.suffix.lower() in READERS}
    training, held_out = _choose_parts(name, list(files), asked)
    if not training and asked[1] is None:
        raise DataError(
            f"{name}: no training file; expected train.jsonl or others of {', '.join(sorted(READERS))}, or "
            f"name one in {_KEYS[True]}"
        )
    return Source(
        training=_chain(files[file] for file in training),
        training_name=f"{name}, {_list(training)}" if training else name,
        validation=_chain(files[file] for file in held_out) if held_out else None,
        validation_name=f"{name}, {_list(held_out)}" if held_out else "",
        not_used=tuple(file for file in files if file not in training and file not in held_out),
    )


def _choose_parts(
    name: str, names: list[str], asked: tuple[str | None, str | None]
) -> tuple[list[str], list[str]]:
    """Return the names that train and those that validate; what is asked for goes before what a name says."""
    held_out = _choose(name, names, asked[1], is_training=False)
    training = _choose(name, names, asked[0], is_training=True)
    if training is None:
        training = _tell_apart(one for one in names if one not in (held_out or ()))[0]
    if held_out is None:
        held_out = _tell_apart(one for one in names if one not in training)[1]
    return training, held_out


def _choose(name: str, names: list[str], split: str | None, *, is_training: bool) -> list[str] | None:
    """Return the files or splits of ``names`` that ``split`` names; None where nothing is asked for."""
    if split is None:
        return None
    chosen = [one for one in names if split in (one, Path(one).stem, _without_shard(one))]
    if not chosen:
        there = ", ".join(dict.fromkeys(map(_without_shard, names))) or "none"
        raise DataError(f"{_KEYS[is_training]}: {name} has no split {show(split)}; there is {there}")
    return chosen


def _without_shard(name: str) -> str:
    """Return ``train`` of ``train-00000-of-00002.parquet``."""
    return re.sub(r"-\d+-of-\d+$", "", Path(name).stem)


def _tell_apart(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names that train and those that validate."""
    parts: dict[str, list[str]] = {_TRAIN: [], "validation": [], _TEST: [], "other": []}
    for name in names:
        word = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
        part = "validation" if word in VALIDATION_NAMES else word
        parts[part if part in parts else "other"].append(name)
    return parts[_TRAIN] or parts["other"], parts["validation"] or parts[_TEST]


def _list(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} to {files[-1]} ({len(files)} files)"


def _chain(files: Iterable[Path]) -> Iterator[Found]:
    for path in files:
        yield from read_file(path)


def _open_hub(name: str, asked: tuple[str | None, str | None]) -> Source:
    from datasets import load_dataset  # 1 s to import, and files need none of it
    from datasets.exceptions import DatasetsError
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if name in _PACKAGED_DATASETS_MODULES:
        raise DataError(
            f"{name}: no data set but a way to read files, those of the working directory; name a file, a "
            "folder, or a hub id (owner/name)"
        )
    try:
        splits: Any = load_dataset(name)
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        # RuntimeError: a data set that is a script, which datasets refuses to run, as we do
        reason = str(error).strip().split("\n", 1)[0]
        raise DataError(
            f"{name}: no such file, and not available from the hub ({type(error).__name__}: {reason}); "
            "check the name and the network, or give a local file"
        ) from error
    names = list(splits)
    if _TRAIN not in names and len(names) > 1 and asked[0] is None:
        raise DataError(
            f"{name}: its splits are {', '.join(names)}; none is called train, name one in {_KEYS[True]}"
        )
    wanted = _choose(name, names, asked[0], is_training=True)
    (training,) = wanted or [_TRAIN if _TRAIN in names else names[0]]
    others = [split for split in names if split != training]
    wanted = _choose(name, others, asked[1], is_training=False)
    held_out = next(iter(wanted or _tell_apart(others)[1]), None)
    return Source(
        training=_rows(name, splits[training]),
        training_name=f"{name}, {training}",
        validation=None if held_out is None else _rows(name, splits[held_out]),
        validation_name="" if held_out is None else f"{name}, {held_out}",
        not_used=tuple(f"{name}, {split}" for split in others if split != held_out),
    )


def _rows(name: str, split: Any) -> Iterator[Found]:
    for number, record in enumerate(split):
        yield parse_found(f"{name}, record {number}", record)
