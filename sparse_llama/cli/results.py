"""What benchmarks share on the command line: lists of numbers, and where results go."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

_TABLE_WIDTH = 112
_GIB = 2**30


def split(text: str) -> list[str]:
    """Return the words between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def numbers(flag: str, text: str | None) -> tuple[int, ...] | None:
    """Return the numbers between commas; None where the flag was not given."""
    if text is None:
        return None
    if not all(re.fullmatch(r"[1-9][0-9]*", word) for word in split(text)):
        raise ConfigError(f"--{flag}: must be whole numbers above 0, with commas between them, got {text!a}")
    return tuple(int(word) for word in split(text))


def budget_bytes(gib: float | None) -> int | None:
    """Return the bytes of ``--budget_gib``; None where it was not given."""
    if gib is None:
        return None
    if not 0 < gib < sys.maxsize / _GIB:
        raise ConfigError(f"--budget_gib: must be > 0, got {gib}")
    return int(gib * _GIB)


def make_folder(folder: Path) -> None:
    """Make the folder of results now, not after minutes of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output_dir {folder}: cannot be made ({error.strerror}); name a folder"
        ) from error


def device_slug(hardware: str, place: "torch.device") -> str:
    """Return ``cpu``, or the GPU's name as a part of a file name: ``nvidia_h200``."""
    if place.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "_", hardware.split(",")[0].lower()).strip("_")


def results_console(width: int = _TABLE_WIDTH) -> "Console":
    """Return a console that folds no table of results: a file and a pipe have no width of their own."""
    from rich.console import Console

    return Console(width=max(Console().width, width))


def tell_files(files: list[Path]) -> None:
    """Print where results are."""
    print("\n".join(f"wrote {file}" for file in files))
