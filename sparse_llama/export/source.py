"""What is exported: an adapter, the base that it belongs to, and how its run attended."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from sparse_llama.adapters.rotation import with_rotation
from sparse_llama.adapters.stored import base_of_adapter, find_adapter, plan_of_adapter, read_adapter
from sparse_llama.adapters.weights import AdapterFile, BaseModelReference
from sparse_llama.errors import CheckpointError
from sparse_llama.export.merged import sparse_ones
from sparse_llama.layouts import Layout
from sparse_llama.model.configuration import read_config
from sparse_llama.model.files import resolve_model


@dataclass(frozen=True)
class Source:
    """An adapter and its base, before any weight of the base is read."""

    adapter: Path
    format: str
    """The program's whose it is, or ``native``."""
    file: AdapterFile
    tensors: dict[str, torch.Tensor]
    """The trained ones, fp32, by their names in the adapted model."""
    notices: tuple[str, ...]
    """What its user has to know of another program's adapter."""
    model: str
    """The base as it was named."""
    base: Path
    config: LlamaConfig
    """The base's, with the rotary settings that the adapter was trained with."""
    layer_layouts: tuple[Layout | None, ...]

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The distinct sparse layouts."""
        return sparse_ones(self.layer_layouts)


def find_source(checkpoint: Path, model: str | None, *, flag: str = "--checkpoint") -> Source:
    """Return the adapter in ``checkpoint`` and its base.

    Args:
        model: hub id or folder of the base; None is the one that the adapter names.
        flag: what ``checkpoint`` was given by.

    Raises:
        CheckpointError: there is no adapter, or it is damaged.
        ModelError: the base is missing, or is no LLaMA.
    """
    adapter = locate(checkpoint, flag=flag)
    try:
        named = BaseModelReference(path=model) if model else base_of_adapter(adapter)
    except CheckpointError as error:
        raise CheckpointError(f"{flag} {error}") from error
    if named is None:
        raise CheckpointError(f"{flag} {checkpoint}: does not name its base; give it with --model")
    base = resolve_model(named.path, named.revision)
    config = read_config(base)
    read = read_adapter(adapter, config, base_model=named)
    config = with_rotation(config, read.file.rope_parameters, read.file.seq_length)
    layouts = _layer_layouts(read.file, config)
    return Source(
        adapter, read.format, read.file, read.tensors, read.notices, named.path, base, config, layouts
    )


def locate(checkpoint: Path, *, flag: str = "--checkpoint") -> Path:
    """Return the adapter that ``flag`` means, or raise CheckpointError."""
    try:
        return find_adapter(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{flag} {error}") from error


def _layer_layouts(file: AdapterFile, config: LlamaConfig) -> tuple[Layout | None, ...]:
    """Return every layer's layout; those that hide nothing in the run's own length are full attention.

    A layout is as long as the model's longest sequence where its mode can be extended.
    """
    plan = plan_of_adapter(file, config)
    longest = plan.max_tokens()
    num_tokens = min(config.max_position_embeddings, longest or config.max_position_embeddings)
    return tuple(
        plan.layout(layer, max(num_tokens, file.master_length))
        if plan.is_sparse_at(file.master_length)
        else None
        for layer in range(config.num_hidden_layers)
    )
