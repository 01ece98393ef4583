"""Rows on disk, so that a second start tokenises nothing: memory-mapped, and shared by the ranks of a host.

An entry is a folder of two files: ``rows.safetensors`` and ``manifest.json``, which holds the account of its
tokens, the size of the other, and the SHA-256 of both. Its name is a hash of everything that the rows depend
on: the records' text, the tokenizer's files, the settings, and the code that makes rows, so no change of any
of them finds old rows. It is written beside its place and renamed: jobs that build one entry at the same time
leave one of theirs, whole.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparse_llama.config.paths import expand
from sparse_llama.config.settings import DataSettings, Settings
from sparse_llama.data import chat, encode, packing, rows
from sparse_llama.data.ledger import Tally
from sparse_llama.data.packing import Row
from sparse_llama.data.records import Example
from sparse_llama.data.rows import EncodedRows
from sparse_llama.data.tokenizer import Tokenizer

ENVIRONMENT = "SPARSE_LLAMA_CACHE"
_ROWS, _MANIFEST = "rows.safetensors", "manifest.json"
_CODE = (chat, encode, packing, rows)
_LIBRARIES = ("sentencepiece", "tokenizers")
_TABLES = ("ids", "positions", "labels")


class RowCache:
    """A folder of entries. What goes wrong with it is said, and costs time only."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self._console = folder, console
        self._has_complained = False

    def load(self, key: str, *, is_verified: bool = True) -> EncodedRows | None:
        """Return the rows of ``key``, mapped; None where there are none or they are damaged.

        Args:
            is_verified: read all of the file for its checksum, not only its size.
        """
        entry = self.folder / key
        if not entry.is_dir():
            return None
        try:
            manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
            reason = _damage(entry / _ROWS, manifest, is_verified=is_verified)
            if reason is None:
                return _unpack(load_file(entry / _ROWS), Tally(**manifest["tally"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {error}"
        self._console.print(f"note: {entry}: damaged ({reason}); tokenising again", style="yellow")
        return None

    def store(self, key: str, encoded: EncodedRows) -> None:
        """Write the rows of ``key``, in place of damaged ones; where that cannot be done it is said once."""
        unfinished: Path | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f".{key[:16]}.", dir=self.folder))
            save_file(_pack(encoded), unfinished / _ROWS)
            manifest = {
                "tally": asdict(encoded.tally),
                "bytes": (unfinished / _ROWS).stat().st_size,
                "sha256": _checksum(unfinished / _ROWS, asdict(encoded.tally)),
            }
            (unfinished / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            self._publish(unfinished, self.folder / key)
        except (OSError, SafetensorError) as error:  # safetensors' own where the disk is full
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            if not self._has_complained:
                self._console.print(
                    f"note: {self.folder}: rows cannot be kept there ({reason}), so every start tokenises "
                    "anew; name another folder in sparse_llama.data.cache_dir",
                    style="yellow",
                )
            self._has_complained = True
        finally:
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)

    def _publish(self, unfinished: Path, entry: Path) -> None:
        """Give a finished entry its name; one of that name that is whole is as good, and stays."""
        unfinished.chmod(0o755)  # mkdtemp's folders are the user's alone
        if entry.exists():
            if RowCache(self.folder, Console(quiet=True)).load(entry.name) is not None:
                return
            entry.rename(unfinished / "damaged")  # who has it mapped keeps what is mapped
        try:
            unfinished.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another job was faster
                raise
        shutil.rmtree(entry / "damaged", ignore_errors=True)


def open_cache(data: DataSettings, console: Console) -> RowCache | None:
    """Return the cache of a run, which need not exist yet; None where it is off.

    It is ``sparse_llama.data.cache_dir``, else the folder in ``SPARSE_LLAMA_CACHE``, else ``sparse-llama`` in
    the user's cache folder (XDG).
    """
    if not data.cache:
        return None
    named = data.cache_dir or os.environ.get(ENVIRONMENT)
    if named:
        return RowCache(expand(named) / "rows", console)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return RowCache(expand(base) / "sparse-llama" / "rows", console)


def rows_key(examples: Iterable[Example], tokenizer: Tokenizer, settings: Settings, align: int) -> str:
    """Return the name of the entry: a hash of all that the rows are made of."""
    is_packed = settings.data.packing
    parts = {
        "tokenizer": tokenizer.fingerprint,
        "seq_length": settings.seq_length,
        "packing": [settings.seed, align] if is_packed else None,
        "code": [hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in _CODE],
        "libraries": [version(name) for name in _LIBRARIES],
    }
    hashed = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for example in examples:
        hashed.update(b"%d turns" % len(example.turns))
        for text in (text for turn in example.turns for text in (turn.prompt, turn.response)):
            content = text.encode()
            hashed.update(b"%d:" % len(content))  # or the texts "ab", "c" would be "a", "bc"
            hashed.update(content)
    return hashed.hexdigest()


def _pack(encoded: EncodedRows) -> dict[str, torch.Tensor]:
    empty = torch.empty(0, dtype=torch.int32)
    tables = {name: [getattr(row, name) for row in encoded.rows] or [empty] for name in _TABLES}
    return {
        **{name: torch.cat(table) for name, table in tables.items()},
        "row_lengths": torch.tensor([len(row) for row in encoded.rows], dtype=torch.int32),
        "fitting": torch.tensor(encoded.fitting, dtype=torch.int32),
        "record_lengths": encoded.record_lengths,
    }


def _unpack(tensors: dict[str, torch.Tensor], tally: Tally) -> EncodedRows:
    lengths = tensors["row_lengths"].tolist()
    tables = [tensors[name].split(lengths) for name in _TABLES]
    made = [Row(*table) for table in zip(*tables, strict=True)]
    return EncodedRows(made, tally, tensors["fitting"].tolist(), tensors["record_lengths"])


def _damage(path: Path, manifest: dict[str, object], *, is_verified: bool) -> str | None:
    found = path.stat().st_size
    if found != manifest["bytes"]:
        return f"{_ROWS} has {found:,} bytes in place of {manifest['bytes']:,}"
    if is_verified and _checksum(path, manifest["tally"]) != manifest["sha256"]:
        return f"{_ROWS} has another SHA-256 than when it was written"
    return None


def _checksum(path: Path, tally: object) -> str:
    """Return the SHA-256 of the rows with the account of their tokens behind them."""
    with path.open("rb") as file:
        hashed = hashlib.file_digest(file, "sha256")
    hashed.update(json.dumps(tally, sort_keys=True).encode())
    return hashed.hexdigest()
