"""The documents of ``ds_configs``, as runs on whatever machine the tests are on."""

import json
from pathlib import Path
from typing import Any

from sparse_llama.config.run import Overrides, Run, load_run

FOLDER = Path(__file__).parents[1] / "ds_configs"
DOCUMENTS = sorted(FOLDER.glob("*.json"))


def processes_of(document: Path) -> int:
    """Return the fewest processes that a document is for: those that share a row."""
    return json.loads(document.read_text(encoding="utf-8")).get("sequence_parallel_size", 1)


def load_shipped(document: Path, folder: Path, world_size: int | None = None, **flags: Any) -> Run:
    """Return a document's run; what it needs installed, such as libaio, is not asked here."""
    overrides = Overrides(output_dir=folder / "out", **flags)
    return load_run(document, overrides, world_size or processes_of(document), is_here=False)
