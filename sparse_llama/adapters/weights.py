"""The adapter folder: ``adapter.safetensors`` (the trained tensors, fp32) and ``adapter_config.json`` (what
they belong to)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_llama.adapters.bank import DEFAULT, bank_of
from sparse_llama.config.layers import Layers, LayerSparsities, LayoutOfLayers, layer_sparsities
from sparse_llama.config.paths import is_file
from sparse_llama.config.rope import FixedRopeParameters
from sparse_llama.config.section import FrozenList, Section, quote, show, show_plain
from sparse_llama.config.settings import MOST_TOKENS, AdapterSettings, TemplateName
from sparse_llama.config.tables import read_table
from sparse_llama.errors import CheckpointError, SparseLlamaError

WEIGHTS_NAME = "adapter.safetensors"
CONFIG_NAME = "adapter_config.json"


class BaseModelReference(Section):
    """The base an adapter was trained on, as the run named it."""

    path: str
    revision: str | None = None


class AdapterFile(Section):
    """``adapter_config.json``: everything but the tensors that is needed to rebuild the adapted model."""

    format: Literal["sparse-llama"] = "sparse-llama"
    format_version: Literal[1] = 1
    base_model: BaseModelReference
    adapter: AdapterSettings
    sparse_attention: dict[str, Any] | None = None
    """The layout's block, as in the run's JSON; None is dense attention."""
    layer_layouts: Annotated[tuple[LayoutOfLayers, ...], FrozenList] = ()
    """Layouts of some layers in its place, and ``dense_layers``: see ``config/layers.py``."""
    dense_layers: Layers | None = None
    master_length: int = Field(ge=1, le=MOST_TOKENS)
    """Tokens of the master layout that shorter sequences are cropped from."""
    seed: int = Field(ge=0, lt=2**63)
    """Of random blocks and of the prompts' initial values."""
    seq_length: int = Field(ge=1, le=MOST_TOKENS)
    rope_parameters: FixedRopeParameters | None = None
    """The rotary settings that it was trained with, in transformers' keys; None is the base's own."""
    template: TemplateName = "alpaca"
    """What stood around questions and answers; evaluation and generation use it too."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """What the run computed in; evaluation and export use it too."""
    trainable_parameters: int
    version: str
    """Of sparse-llama, when this was written."""

    @property
    def layouts(self) -> LayerSparsities:
        """Which layer attends by which layout."""
        return layer_sparsities(self.sparse_attention, self.layer_layouts, self.dense_layers)


def write_adapter_folder(folder: Path, tensors: dict[str, torch.Tensor], config: AdapterFile) -> None:
    """Write ``tensors`` as fp32 and ``config`` into ``folder``, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    # clone: safetensors refuses tensors that share memory, as views of DeepSpeed's flat buffers do
    whole = {name: tensor.detach().to("cpu", torch.float32).clone() for name, tensor in tensors.items()}
    _replace(folder / WEIGHTS_NAME, lambda path: save_file(whole, path, metadata={"format": "pt"}))
    text = json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
    _replace(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def is_native(folder: Path) -> bool:
    """Return whether ``folder`` holds, or should hold, an adapter of this project's own format."""
    if not is_file(folder / CONFIG_NAME):
        return is_file(folder / WEIGHTS_NAME)
    try:
        return "peft_type" not in read_table(folder / CONFIG_NAME, CheckpointError)
    except CheckpointError:
        return True  # damaged: reading it says how


def read_adapter_config(folder: Path) -> AdapterFile:
    """Return the configuration of an adapter folder; raises as ``read_adapter_folder``."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not is_file(folder / name):
            raise CheckpointError(
                f"{folder}: no {name}; an adapter folder holds {WEIGHTS_NAME} and {CONFIG_NAME}, such as "
                "OUTPUT_DIR/adapter"
            )
    return _read_config(folder / CONFIG_NAME)


def read_adapter_folder(folder: Path) -> tuple[AdapterFile, dict[str, torch.Tensor]]:
    """Return the configuration and the fp32 tensors of an adapter folder.

    Raises:
        CheckpointError: a file is missing, damaged, or of another program or version.
    """
    config, path = read_adapter_config(folder), folder / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({show_plain(str(error))}); copy or train it again"
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{path}: {show_plain(name)} is {dtype}, an adapter's tensors are float32; copy it again"
            )
    check_finite(tensors, str(path))
    return config, tensors


def check_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse an adapter that would answer nonsense to everything.

    Raises:
        CheckpointError: a tensor holds what is no number.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{source}: {show_plain(name)} holds NaN or infinity; the run that wrote it diverged, or the "
                "file is damaged: copy it again, or take an earlier checkpoint"
            )


@torch.no_grad()
def apply_adapter(
    model: nn.Module, tensors: dict[str, torch.Tensor], *, name: str = DEFAULT, source: str = "the adapter"
) -> None:
    """Copy ``tensors`` into an adapter of ``model``; names and shapes must agree both ways.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; nothing has been copied then.
    """
    bank = bank_of(model)
    assert bank is not None, "attach_adapters comes first"
    parameters = bank.adapters[name].parameters
    check_fits({path: parameter.shape for path, parameter in parameters.items()}, tensors, source)
    for path, parameter in parameters.items():
        parameter.copy_(tensors[path])


def check_fits(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor], source: str
) -> None:
    """Refuse tensors that are not those of an adapter with these names and shapes.

    Raises:
        CheckpointError: one is missing, unknown or of another shape.
    """
    missing, unexpected = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unexpected:
        found = [
            f"{len(names)} {word} (first {show_plain(names[0])})"
            for names, word in ((missing, "missing"), (unexpected, "unexpected"))
            if names
        ]
        raise CheckpointError(
            f"{source}: {' and '.join(found)} of {len(shapes)} tensors; "
            "it was trained with other adapter settings or on another base"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise CheckpointError(
                f"{source}: {name} has shape {list(tensors[name].shape)}, this base needs {list(shape)}; it "
                "was trained on another base"
            )


def _read_config(path: Path) -> AdapterFile:
    document = read_table(path, CheckpointError)
    if document.get("format") != "sparse-llama":
        found = document.get("peft_type") or document.get("format")
        raise CheckpointError(
            f'{path}: "format" must be "sparse-llama"' + (f", found {quote(str(found))}" if found else "")
        )
    version = document.get("format_version")
    if version != 1:
        raise CheckpointError(
            f"{path}: format_version {show(version)} is not one this version reads (1); update sparse-llama"
        )
    try:
        file = AdapterFile.parse(document)
        _ = file.layouts  # whose blocks have a check of their own
    except SparseLlamaError as error:
        raise CheckpointError(f"{path}: {error}; copy it again, or update sparse-llama") from error
    return file


def _replace(path: Path, write: Any) -> None:
    """Write beside ``path`` and rename, so that a killed process leaves the old file or the new one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    write(unfinished)
    unfinished.replace(path)
