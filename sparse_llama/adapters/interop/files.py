"""Tensors out of another program's file or folder, without running any code that the file brings."""

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparse_llama.config.paths import is_file, is_folder
from sparse_llama.config.section import quote, show_plain
from sparse_llama.config.tables import read_table
from sparse_llama.errors import CheckpointError

PEFT_CONFIG = "adapter_config.json"
_PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT too takes the first that is there
_KNOWN = (
    "lit_model.pth.adapter",
    "lit_model.pth.adapter_v2",
    "lit-llama-adapter-finetuned.pth",
)
_LONGEST_NAME = 200
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".adapter", ".adapter_v2")


@dataclass(frozen=True)
class StoredAdapter:
    """What a file holds, as it is."""

    path: Path
    tensors: dict[str, torch.Tensor]
    is_nested: bool = False
    """Whether the tensors are under "model", beside other things."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Those other things."""
    peft_config: Mapping[str, Any] | None = None
    """PEFT's ``adapter_config.json``, where there is one."""


def read_stored(path: Path) -> StoredAdapter:
    """Return the tensors of a file, or of the only adapter file in a folder; memory-mapped where that can be.

    Raises:
        CheckpointError: there is no such file, it is damaged, or reading it would run code.
    """
    file = _find_file(path)
    config = _read_peft_config(file.with_name(PEFT_CONFIG)) if file.name in _PEFT_WEIGHTS else None
    if file.suffix == ".safetensors":
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            reason = show_plain(str(error))
            raise CheckpointError(
                f"{file}: not a complete safetensors file ({reason}); copy it again"
            ) from error
        _check_tensors(tensors, file)
        return StoredAdapter(file, tensors, peft_config=config)
    document = load_plain(file)
    inner = document.get("model") if isinstance(document, Mapping) else None
    found = inner if isinstance(inner, Mapping) else document
    tensors = found if isinstance(found, Mapping) else {}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{file}: holds a {type(found).__name__} without tensors; a dict of tensors, or one under "
            '"model", is what adapters are saved as'
        )
    _check_tensors(tensors, file)
    is_nested = found is inner
    beside = {key: value for key, value in document.items() if key != "model"} if is_nested else {}
    return StoredAdapter(file, tensors, is_nested, beside, config)


def _check_tensors(tensors: Mapping[Any, torch.Tensor], file: Path) -> None:
    """Refuse what no adapter of any program has: names that no line could repeat, tensors without elements,
    and weights without an axis."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise CheckpointError(
                f"{file}: has a tensor {quote(str(name))}, which no adapter has; copy it again"
            )
        if tensor.numel() == 0 or (tensor.dim() == 0 and tensor.is_floating_point()):
            raise CheckpointError(
                f"{file}: {name} has shape {list(tensor.shape)}, as nothing of an adapter has; copy it again"
            )


def _find_file(path: Path) -> Path:
    if is_file(path):
        return path
    if not is_folder(path):
        raise CheckpointError(f"{path}: no such file or folder; name an adapter file or the folder with it")
    if (path / PEFT_CONFIG).is_file():
        _read_peft_config(path / PEFT_CONFIG)
        weights = [path / name for name in _PEFT_WEIGHTS if (path / name).is_file()]
        if weights:
            return weights[0]
    files = [path / name for name in _KNOWN if (path / name).is_file()]
    files = files or sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:3]) or "none"
        raise CheckpointError(
            f"{path}: must hold exactly one adapter file ({', '.join(_SUFFIXES)}), found {found}; name the "
            "file itself"
        )
    return files[0]


def _read_peft_config(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    config = read_table(path, CheckpointError)
    kind = config.get("peft_type")
    if kind is not None and kind != "ADAPTION_PROMPT":
        raise CheckpointError(
            f"{path}: peft_type is {quote(str(kind))}; only ADAPTION_PROMPT is a LLaMA-Adapter: merge other "
            "PEFT adapters into their base with PEFT (merge_and_unload) and train on that"
        )
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise CheckpointError(f"{path}: base_model_name_or_path must be a name or a folder; copy it again")
    return config


def load_plain(path: Path) -> Any:
    """Return what ``torch.save`` wrote to ``path``: plain tensors and values, mapped where that can be.

    Raises:
        CheckpointError: it is damaged, or holds what only code in the file could make; that is never run.
    """
    try:
        # The original's training checkpoints hold their arguments in one: values only, made without code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged bytes make the unpickler do, and raise, whatever they spell
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise CheckpointError(
                f"{path}: holds a {code[1]}, which only code in the file could make, and that is never run; "
                "save its tensors alone (torch.save of a dict of tensors, or .safetensors)"
            ) from None
        text = str(error).rpartition("WeightsUnpickler error:")[2]  # after advice about weights_only
        reason = show_plain(text)[:80] or type(error).__name__
        raise CheckpointError(
            f"{path}: not a file that torch.save wrote, or not all of it ({reason}); copy it again"
        ) from None
