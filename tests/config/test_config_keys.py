"""Every key of a document, in one file that shows what a change adds or takes away.

``python tests/config/test_config_keys.py > tests/golden/config_keys.txt`` writes it anew.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from sparse_llama.config.deepspeed import Document
from sparse_llama.config.optimizer import OPTIMIZERS
from sparse_llama.config.schedule import SCHEDULERS
from sparse_llama.config.section import Section, show
from sparse_llama.config.sparsity import MODES

GOLDEN = Path(__file__).parents[1] / "golden" / "config_keys.txt"


def keys_of(section: type[Section], path: str) -> Iterator[str]:
    """Yield a line ``path = default`` for every key of a block and of the blocks in it."""
    for name, field in section.model_fields.items():
        here = f"{path}{field.alias or name}"
        parts = (field.annotation, *get_args(field.annotation))
        inner = next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)
        if inner is not None:
            yield from keys_of(inner, f"{here}.")
        elif field.is_required():
            yield f"{here} (required)"
        else:
            yield f"{here} = {show(field.get_default())}"


def all_keys() -> list[str]:
    lines = list(keys_of(Document, ""))
    for choices, path in (
        (OPTIMIZERS, "optimizer.params"),
        (SCHEDULERS, "scheduler.params"),
        (MODES, "sparse_attention"),
    ):
        for name, section in choices.items():
            lines += keys_of(section, f"{path}[{name}].")
    return sorted(lines)


def test_the_keys_of_a_document_are_those_in_the_golden_file():
    assert all_keys() == GOLDEN.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    print("\n".join(all_keys()))
