"""Folders that are there whole or not at all: written aside, flushed to the drive, listed with sizes and
SHA-256 in ``manifest.json``, and published in one rename.

A power cut between the rename and the flush of the parent folder leaves the folder absent, never incomplete;
what a drive or a copy damages later is told by the manifest.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def publish(unfinished: Path, target: Path) -> None:
    """Give a folder whose files are all written its name, once they and their manifest are on the drive.

    Raises:
        OSError: the drive is full or gone; ``target`` does not exist then.
    """
    assert not target.exists()
    files = {path.name: _entry(path) for path in sorted(unfinished.iterdir())}
    write_durably(unfinished / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")
    for name in files:
        _flush(unfinished / name)
    _flush(unfinished)
    unfinished.rename(target)
    _flush(target.parent)


def find_damage(folder: Path) -> str | None:
    """Return in a few words what is wrong with a published folder; None where every file is as it was
    written. Files that the manifest does not name are no damage."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            if "/" in name or name in (".", ".."):
                return f"{MANIFEST} names {name!r}, which is not in it"
            if damage := _compare(folder / name, entry):
                return damage
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    return None


def write_durably(path: Path, text: str) -> None:
    """Put ``text`` in place of a file in one rename, and flush it to the drive."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    _flush(unfinished)
    unfinished.replace(path)
    _flush(path.parent)


def remove(folder: Path) -> None:
    """Delete a published folder; a process that is killed meanwhile leaves nothing under its name."""
    leaving = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _checksum(path)}


def _compare(path: Path, entry: dict[str, Any]) -> str | None:
    found = path.stat().st_size
    if found != entry["bytes"]:
        return f"{path.name} has {found:,} bytes in place of {entry['bytes']:,}"
    if _checksum(path) != entry["sha256"]:
        return f"{path.name} has another SHA-256 than when it was saved"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the drive."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
