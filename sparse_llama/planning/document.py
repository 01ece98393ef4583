"""The JSON document of a run that a plan found: the user's own, with the changes in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from sparse_llama.config.flags import Overrides, apply_flags
from sparse_llama.config.run import Run
from sparse_llama.planning.levers import Lever, set_key

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


def keys_of_longest(run: Run, lever: Lever, num_tokens: int, config: LlamaConfig) -> dict[str, Any]:
    """Return the keys of ``run`` with rows of ``num_tokens``, rounded as people write it, under a lever; with
    yarn's positions where the base was made for fewer and the run does not say how they are stretched."""
    length = round_length(num_tokens)
    keys = {
        **lever.keys,
        "train_batch_size": None,
        "train_micro_batch_size_per_gpu": run.micro_batch_size,
        "gradient_accumulation_steps": run.gradient_accumulation_steps,
        "sparse_llama.seq_length": length,
        "sparse_llama.attention.master_length": None,
    }
    if length > config.max_position_embeddings and run.settings.model.rope_parameters is None:
        keys["sparse_llama.model.rope_parameters"] = {"rope_type": "yarn", "factor": "auto"}
    return keys


def round_length(num_tokens: int) -> int:
    """Return a length as people write it, at most 1/16 shorter: a multiple of 64, 1,024 or 4,096."""
    grain = 4096 if num_tokens >= 2**16 else 1024 if num_tokens >= 2**14 else 64
    return num_tokens // grain * grain


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
