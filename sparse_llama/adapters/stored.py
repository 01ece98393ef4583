"""An adapter on disk, whichever program wrote it: onto a model, and from one."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama import __version__
from sparse_llama.adapters.attach import attach_adapters
from sparse_llama.adapters.bank import DEFAULT, AdapterBank, NamedAdapter, bank_of, require_bank
from sparse_llama.adapters.interop import named_base, read_foreign
from sparse_llama.adapters.interop.ours import adapter_shapes
from sparse_llama.adapters.rotation import fixed_parameters, same_rotation, with_rotation
from sparse_llama.adapters.weights import (
    AdapterFile,
    BaseModelReference,
    apply_adapter,
    check_finite,
    check_fits,
    is_native,
    read_adapter_config,
    read_adapter_folder,
    write_adapter_folder,
)
from sparse_llama.attention.interface import AttentionPlan, plan_attention
from sparse_llama.config.paths import exists
from sparse_llama.errors import CheckpointError, ConfigError

_log = logging.getLogger(__name__)
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedAdapter:
    """What was read."""

    format: str
    file: AdapterFile
    tensors: dict[str, torch.Tensor]
    """fp32, by their names in the adapted model."""
    notices: tuple[str, ...] = ()
    """What the user has to know of the program that wrote it."""


def find_adapter(path: Path) -> Path:
    """Return the adapter that ``path`` means: itself, or the one of a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    if is_native(path / "adapter"):
        return path / "adapter"
    steps = sorted((path / "checkpoints").glob("step_*"))
    if steps:
        raise CheckpointError(
            f"{path}: this run has not finished (no adapter/); name its newest checkpoint, {steps[-1]}"
        )
    if not exists(path):
        raise CheckpointError(
            f"{path}: no such file or folder; name a run's folder, an adapter folder, a "
            "checkpoints/step_NNNNNN folder, or an adapter of PEFT, lit-llama, litgpt or LLaMA-Adapter"
        )
    return path


def base_of_adapter(path: Path) -> BaseModelReference | None:
    """Return the base that an adapter names; None where it names none, as most formats do."""
    if is_native(path):
        return read_adapter_config(path).base_model
    name = named_base(path)
    return None if name is None else BaseModelReference(path=name)


def read_adapter(path: Path, base: LlamaConfig, *, base_model: BaseModelReference) -> LoadedAdapter:
    """Return the adapter at ``path``, a file or folder of any format, in this project's terms.

    Args:
        base_model: what to note as the base of another program's.

    Raises:
        CheckpointError: it is missing, damaged, of an unknown format, or does not fit ``base``.
    """
    if is_native(path):
        file, tensors = read_adapter_folder(path)
        check_fits(adapter_shapes(file.adapter, base), tensors, str(path))
        return LoadedAdapter("native", file, tensors)
    foreign = read_foreign(path, base)
    check_finite(foreign.tensors, str(path))
    longest = base.max_position_embeddings
    file = AdapterFile.model_validate(
        {
            "base_model": base_model,
            "adapter": foreign.settings,
            "master_length": longest,
            "seed": 0,
            "seq_length": longest,
            "dtype": _dtype_name(base.dtype),
            "trainable_parameters": sum(tensor.numel() for tensor in foreign.tensors.values()),
            "version": __version__,
        }
    )
    return LoadedAdapter(foreign.format, file, foreign.tensors, foreign.notices)


def load_adapter(
    model: LlamaForCausalLM, path: str | Path, *, name: str = DEFAULT, is_trainable: bool = False
) -> LoadedAdapter:
    """Add the adapter at ``path`` to ``model``, make it the active one, and return what was read.

    It brings what it was trained with: its variant, its layout of sparse attention, which the model attends
    by while this adapter is active. What its format's program would compute otherwise is logged.

    Args:
        path: a run's folder, an adapter folder, or an adapter of PEFT, lit-llama, litgpt or LLaMA-Adapter.
        name: to tell several adapters of one base apart; one of the same name is replaced.
        is_trainable: whether its parameters require gradients.

    Raises:
        CheckpointError: there is no adapter, or it does not fit the model, which then computes what it did.
    """
    source = find_adapter(Path(path))
    base = BaseModelReference(path=model.name_or_path or "")
    stored = read_adapter(source, model.config, base_model=base)
    _check_rotation(model.config, stored.file, source)
    plan = None if stored.file.layouts.is_dense else plan_of_adapter(stored.file, model.config)
    bank = bank_of(model)
    before = None if bank is None else (dict(bank.adapters), bank.active)
    attach_adapters(
        model, stored.file.adapter, seed=stored.file.seed, name=name, plan=plan, template=stored.file.template
    )
    bank = require_bank(model)
    try:
        apply_adapter(model, stored.tensors, name=name, source=str(source))
    except CheckpointError:
        bank.remove(model, name)
        if before is not None:
            bank.adapters, active = before
            bank.activate(model, active)
        raise
    for parameter in bank.adapters[name].parameters.values():
        parameter.requires_grad_(is_trainable)
    for notice in stored.notices:
        _log.warning("%s: %s", source, notice)
    return stored


def save_adapter(
    model: LlamaForCausalLM, folder: str | Path, *, name: str | None = None, base_model: str | None = None
) -> None:
    """Write an adapter of ``model`` as the folder that training writes: fp32 tensors and configuration.

    Args:
        name: of the adapter; None is the active one.
        base_model: hub id or folder of the base, to be noted; None is where the model was loaded from.

    Raises:
        ConfigError: several adapters are active and none is named, or the base has no name.
    """
    bank = require_bank(model)
    adapter = _chosen(bank, name)
    base = base_model or model.name_or_path
    if not base:
        raise ConfigError(
            "save_adapter: the model was not loaded from anywhere; name its base with base_model"
        )
    layouts = adapter.plan.sparsities().packed().to_json()
    longest = model.config.max_position_embeddings
    length = max((master.num_tokens for master in adapter.plan.masters), default=longest)
    file = AdapterFile.model_validate(
        {
            "base_model": BaseModelReference(path=base),
            "adapter": adapter.settings,
            "sparse_attention": layouts["sparse_attention"],
            "layer_layouts": layouts["layouts"],
            "master_length": length,
            "seed": adapter.seed,
            "seq_length": length,
            "rope_parameters": fixed_parameters(model.config),
            "template": adapter.template,
            "dtype": _dtype_name(model.dtype),
            "trainable_parameters": sum(tensor.numel() for tensor in adapter.parameters.values()),
            "version": __version__,
        }
    )
    write_adapter_folder(Path(folder), dict(adapter.parameters), file)


def plan_of_adapter(file: AdapterFile, config: LlamaConfig) -> AttentionPlan:
    """Return how an adapter's run attended: its layouts are part of the model."""
    return plan_attention(
        file.layouts.resolve(config.num_hidden_layers),
        num_heads=config.num_attention_heads,
        master_length=file.master_length,
        seed=file.seed,
    )


def _check_rotation(config: LlamaConfig, file: AdapterFile, source: Path) -> None:
    """Refuse an adapter whose run turned positions otherwise: all adapters of a model share its rotation.

    Raises:
        CheckpointError: as said, with what the base has to be loaded with.
    """
    needed = with_rotation(config, file.rope_parameters, file.seq_length)
    if not same_rotation(needed, config):
        raise CheckpointError(
            f"{source}: was trained with positions by {file.rope_parameters}, this model turns them "
            f"otherwise; load the base with rope_parameters={needed.rope_parameters}, "
            f"max_position_embeddings={needed.max_position_embeddings}"
        )


def _chosen(bank: AdapterBank, name: str | None) -> NamedAdapter:
    if name is None:
        if len(bank.active) != 1:
            raise ConfigError(
                f"save_adapter: {len(bank.active)} adapters are active; name one of {bank.names}"
            )
        (name,) = bank.active
    return bank.find(name, "save_adapter")


def _dtype_name(dtype: torch.dtype | str | None) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if name in _DTYPES else "float32"
