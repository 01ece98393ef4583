"""Where the bundled model and data set lie: names that start with ``bundled:`` are folders of this
package."""

from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "demo" / "bundled"
MODELS = {"bundled:tiny-llama": _FOLDER / "model"}
DATASETS = {"bundled:people": _FOLDER / "data" / "people"}


def resolve_bundled(name: str) -> Path | None:
    """Return the folder of a ``bundled:`` name; None for every other name. Whether it exists is the reader's
    to check."""
    return (MODELS | DATASETS).get(name)
