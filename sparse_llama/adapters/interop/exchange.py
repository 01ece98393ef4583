"""The four formats behind one door: which one a file is in, and reading and writing it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import LlamaConfig

from sparse_llama.adapters.interop import lit_llama, litgpt, llama_adapter, peft
from sparse_llama.adapters.interop.files import StoredAdapter, read_stored
from sparse_llama.adapters.interop.ours import ForeignAdapter, check
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import CheckpointError

# In the order of asking: litgpt's names are among those that lit-llama would take.
_FORMATS = {module.FORMAT: module for module in (peft, litgpt, lit_llama, llama_adapter)}
FOREIGN = ("peft", "lit-llama", "litgpt", "llama-adapter")


def recognise(path: Path) -> str:
    """Return the format of an adapter file or folder, from its tensors' names.

    Raises:
        CheckpointError: it is in none, damaged, or would run code.
    """
    return _format_of(read_stored(path))


def read_foreign(path: Path, base: LlamaConfig) -> ForeignAdapter:
    """Return another program's adapter for a base with this configuration.

    Raises:
        CheckpointError: as ``recognise``, or it is incomplete, of another base, or means what no adapter here
            can.
    """
    stored = read_stored(path)
    return _FORMATS[_format_of(stored)].read(stored, base)


def named_base(path: Path) -> str | None:
    """Return the base that an adapter's file names; None where its format has no word for it.

    Raises:
        CheckpointError: as ``recognise``.
    """
    stored = read_stored(path)
    return _FORMATS[_format_of(stored)].named_base(stored)


def write_foreign(
    format: str,
    folder: Path,
    settings: AdapterSettings,
    tensors: Mapping[str, torch.Tensor],
    base: LlamaConfig,
    *,
    base_model: str,
) -> tuple[str, ...]:
    """Write an adapter of ours into ``folder`` as ``format`` has it, fp32, and return what to tell its user.

    Args:
        base_model: name of the base, for the formats that keep it.

    Raises:
        CheckpointError: the tensors are not those of ``settings`` on ``base``.
        ExportError: the format cannot hold the adapter, or its program has no such base.
    """
    check(settings, tensors, base, source="the adapter")
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()}
    return _FORMATS[format].write(folder, settings, whole, base, base_model)


def _format_of(stored: StoredAdapter) -> str:
    for format, module in _FORMATS.items():
        if module.matches(stored):
            return format
    first = ", ".join(sorted(stored.tensors)[:2])
    raise CheckpointError(
        f"{stored.path}: not an adapter of {', '.join(FOREIGN)}: found {len(stored.tensors)} tensors "
        f"({first} ...); name the adapter's own file or folder, not the base's"
    )
