"""Reading what a run left behind."""

import json
from pathlib import Path


def losses(output_dir: Path) -> list[float]:
    """Return the loss of every step in ``metrics.jsonl``."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]
