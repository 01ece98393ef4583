"""What must fit together across blocks, once the flags are in; and the batch sizes that follow from one
another."""

import ctypes.util
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from sparse_llama.config.deepspeed import Document
from sparse_llama.config.layers import LayerSparsities
from sparse_llama.config.mask_file import open_mask
from sparse_llama.config.optimizer import OFFLOADABLE, ZERO_TESTED
from sparse_llama.config.section import alternatives
from sparse_llama.config.settings import AdapterSettings, Settings
from sparse_llama.config.sparsity import MaskSparsity
from sparse_llama.errors import ConfigError

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def resolve_batch(document: Mapping[str, Any], world_size: int) -> dict[str, int]:
    """Return the three batch sizes, those left out filled in by DeepSpeed's rules.

    Processes that share their rows (``sequence_parallel_size``) count once.

    Raises:
        ConfigError: they do not multiply up, neither the batch nor the micro-batch is given, or the processes
            cannot be put into groups.
    """
    batch, micro, steps = (document.get(key) for key in BATCH_KEYS)
    sharing = document.get("sequence_parallel_size", 1)
    _check_groups(sharing, world_size)
    readers = world_size // sharing
    if batch is None and micro is None:
        raise ConfigError(
            "train_micro_batch_size_per_gpu: missing; give it, or train_batch_size, the rows of one "
            "optimizer step"
        )
    if batch is None:
        assert micro is not None
        steps = steps or 1
        batch = micro * steps * readers
    elif micro is None:
        steps = steps or 1
        micro = batch // (steps * readers)
    elif steps is None:
        steps = batch // (micro * readers)
    if batch != micro * steps * readers:
        raise ConfigError(
            f"train_batch_size: {batch} rows are not train_micro_batch_size_per_gpu "
            f"({_or_open(document, 1)}) x gradient_accumulation_steps ({_or_open(document, 2)}) x "
            f"{_processes(readers) if sharing == 1 else _groups(readers, sharing)}; change one of them"
        )
    return dict(zip(BATCH_KEYS, (batch, micro, steps), strict=True))


def _check_groups(sharing: int, world_size: int) -> None:
    if world_size % sharing:
        allowed = [str(size) for size in range(1, world_size + 1) if world_size % size == 0]
        raise ConfigError(
            f"sequence_parallel_size: {_processes(world_size)} cannot make groups of {sharing} that share "
            f"their rows; start a multiple of {sharing} (deepspeed --num_gpus {sharing} ...), or use "
            f"{alternatives(allowed)}"
        )


def _processes(number: int) -> str:
    return f"{number} process" + ("" if number == 1 else "es")


def _groups(number: int, sharing: int) -> str:
    return f"{number} group{'' if number == 1 else 's'} of {_processes(sharing)} (sequence_parallel_size)"


def _or_open(document: Mapping[str, Any], index: int) -> str:
    value = document.get(BATCH_KEYS[index])
    return "any" if value is None else str(value)


def check_precision(checked: Document) -> None:
    """Refuse a run in two precisions, and gradients summed in one that the ZeRO stage does not know.

    Raises:
        ConfigError: as said.
    """
    if (
        checked.bf16 is not None
        and checked.bf16.enabled
        and checked.fp16 is not None
        and checked.fp16.enabled
    ):
        raise ConfigError("bf16.enabled, fp16.enabled: both are true; keep one of them")
    stage = checked.zero_optimization.stage
    if checked.data_types.grad_accum_dtype is not None and stage < 2:
        raise ConfigError(
            f"data_types.grad_accum_dtype: stage {stage} sums gradients in the compute precision; "
            "use zero_optimization.stage 2 or 3, or leave it out"
        )


def check_monitors(checked: Document) -> None:
    """Refuse a monitor whose package is not installed: DeepSpeed would end in its ModuleNotFoundError.

    Raises:
        ConfigError: as said, with the package to install.
    """
    for name, module, package in (("wandb", "wandb", "wandb"), ("comet", "comet_ml", "comet-ml")):
        if getattr(checked, name).enabled and find_spec(module) is None:
            raise ConfigError(
                f"{name}.enabled: needs the package {package}, which is not installed; "
                f"pip install {package}, or set it to false"
            )


def check_zero(checked: Document, optimizer: str, *, is_here: bool = True) -> None:
    """Refuse offload that the stage has not, and optimizers that offload or ZeRO has not.

    Raises:
        ConfigError: as said; DeepSpeed would silently do something else, or stop in the middle.
    """
    zero = checked.zero_optimization
    devices = {
        "offload_optimizer": "none" if zero.offload_optimizer is None else zero.offload_optimizer.device,
        "offload_param": "none" if zero.offload_param is None else zero.offload_param.device,
    }
    for name, device in devices.items():
        if device != "none" and zero.stage == 0:
            raise ConfigError(
                f"zero_optimization.{name}: stage 0 cannot offload; use stage 1 to 3, or drop it with "
                "--offload none"
            )
    if devices["offload_optimizer"] == "nvme" and zero.stage < 3:
        raise ConfigError(
            f'zero_optimization.offload_optimizer.device: "nvme" needs stage 3, the stage is {zero.stage}; '
            'use "cpu"'
        )
    if zero.stage == 3:
        for name, block in (
            ("offload_optimizer", zero.offload_optimizer),
            ("offload_param", zero.offload_param),
        ):
            if block is not None and block.device == "nvme" and not block.nvme_path:
                raise ConfigError(
                    f'zero_optimization.{name}.nvme_path: missing; device "nvme" needs a folder on the '
                    "drive, here or by --nvme_path"
                )
        for name, device in devices.items():
            if device == "nvme" and is_here:
                require_libaio(f"zero_optimization.{name}.device")
    if devices["offload_optimizer"] != "none" and optimizer not in OFFLOADABLE:
        raise ConfigError(
            f"optimizer.type: {optimizer} cannot be offloaded; use {' or '.join(OFFLOADABLE)}, or drop "
            "zero_optimization.offload_optimizer"
        )
    if zero.stage > 0 and optimizer not in ZERO_TESTED and not checked.zero_allow_untested_optimizer:
        raise ConfigError(
            f"optimizer.type: DeepSpeed has not tested {optimizer} with ZeRO; use stage 0 or "
            f'{", ".join(ZERO_TESTED)}, or add "zero_allow_untested_optimizer": true'
        )


def require_libaio(key: str) -> None:
    """Refuse NVMe offload, asked for by ``key``, where the library that DeepSpeed reads and writes the drive
    with is not installed.

    Raises:
        ConfigError: naming the package.
    """
    if ctypes.util.find_library("aio") is None:
        raise ConfigError(
            f'{key}: "nvme" needs libaio, which is not installed; install the package libaio-dev '
            '(libaio-devel on Fedora and RHEL), or use "cpu"'
        )


def check_start(settings: Settings) -> None:
    """Refuse two words on what the adapter is.

    Raises:
        ConfigError: an adapter to train on from, and a variant.
    """
    if settings.training.init_adapter is not None and settings.adapter != AdapterSettings():
        raise ConfigError(
            "sparse_llama.adapter: the run trains on from sparse_llama.training.init_adapter as it is; "
            "leave this block out"
        )


def check_shards(settings: Settings, sharing: int) -> None:
    """Refuse rows that ranks cannot share evenly: padding them would make them longer than they may be.

    Raises:
        ConfigError: naming the nearest lengths that can.
    """
    length = settings.seq_length
    if length % sharing:
        below = length // sharing * sharing
        raise ConfigError(
            f"sparse_llama.seq_length: {length} tokens cannot be shared by {sharing} ranks "
            f"(sequence_parallel_size) evenly; use {below or ''}{' or ' if below else ''}{below + sharing}"
        )


def check_lengths(settings: Settings, layouts: LayerSparsities) -> None:
    """Refuse a master layout shorter than the rows cropped from it, or than its own window; and a mask's file
    that is none, or too small for it.

    Raises:
        ConfigError: as said.
    """
    master = settings.attention.master_length
    assert master is not None
    if master < settings.seq_length:
        raise ConfigError(
            f"sparse_llama.attention.master_length: {master} tokens are fewer than seq_length, "
            f"{settings.seq_length}; use at least {settings.seq_length}, or leave it out"
        )
    for sparsity in layouts.distinct:
        num_blocks = -(-master // sparsity.block)
        key, needed = sparsity.num_blocks_needed()
        if needed > num_blocks:
            raise ConfigError(
                f"sparse_attention.{key}: {needed} blocks of {sparsity.block}, but a layout of {master} "
                f"tokens has {num_blocks}; use at most {num_blocks}, or "
                f"sparse_llama.attention.master_length >= {(needed - 1) * sparsity.block + 1}"
            )
        if isinstance(sparsity, MaskSparsity):
            open_mask(sparsity, num_blocks)
