"""The JSON document of a run that a plan found: the user's own, with the changes in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_llama.config.flags import Overrides, apply_flags
from sparse_llama.planning.levers import set_key

_STALE = ("_run", "_about", "_made_by", "_density")  # what the changes make untrue


def changed_document(
    path: Path, flags: Overrides, keys: Mapping[str, Any], *, comments: Mapping[str, str]
) -> dict[str, Any]:
    """Return the document at ``path`` with ``flags`` and then ``keys`` in it, comments kept.

    Args:
        path: of a document that ``load_run`` has taken.
        keys: dotted path to value; None takes the key out.
        comments: to begin with, names starting with ``_``.
    """
    written = json.loads(path.read_text(encoding="utf-8-sig"))
    document = apply_flags(_without(written), flags)
    for key, value in keys.items():
        set_key(document, key, value)
    if document.get("activation_checkpointing") is None:
        document.pop("activation_checkpointing", None)
    return dict(comments) | document


def write_document(file: Path, document: Mapping[str, Any]) -> None:
    """Write a document as people edit it."""
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _without(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``block`` without nulls, which say "not given", and without comments that would be untrue."""
    return {
        key: _without(value) if isinstance(value, Mapping) else value
        for key, value in block.items()
        if value is not None and key not in _STALE
    }
