"""What was changed so that a run could go on after its memory had run out, in ``retries.json``."""

import json
from pathlib import Path
from typing import Any

from sparse_llama.training.metrics import write_json
from sparse_llama.training.out_of_memory import Shortage

_NAME = "retries.json"


def read_retries(output_dir: Path) -> list[dict[str, Any]]:
    """Return the retries of the run in ``output_dir``, oldest first; empty where there was none."""
    path = output_dir / _NAME
    return json.loads(path.read_text(encoding="utf-8"))["retries"] if path.is_file() else []


def add_retry(output_dir: Path, shortage: Shortage, *, change: str, flags: list[str]) -> None:
    """Record that the run goes on after ``shortage``, with ``flags`` added to its command line."""
    output_dir.mkdir(parents=True, exist_ok=True)
    entry = {"change": change, "flags": flags, "out_of_memory": shortage.to_json()}
    write_json(output_dir / _NAME, {"retries": [*read_retries(output_dir), entry]})


def forget_retries(output_dir: Path) -> None:
    """Delete the record: another run takes the folder."""
    (output_dir / _NAME).unlink(missing_ok=True)
