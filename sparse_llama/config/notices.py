"""What in a document has no effect on this run, said once instead of passed over in silence."""

from collections.abc import Iterator, Mapping
from typing import Any

from sparse_llama.config.deepspeed import Document
from sparse_llama.config.flags import Overrides
from sparse_llama.config.layers import LayerSparsities
from sparse_llama.config.neox import is_neox, unread_options
from sparse_llama.config.schedule import AUTO
from sparse_llama.config.settings import Settings
from sparse_llama.config.sparsity import Sparsity, unread_keys
from sparse_llama.config.zero import STAGE3_KEYS, UNUSED_KEYS

SWITCHED_BLOCKS = (
    "bf16",
    "fp16",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "flops_profiler",
    "comms_logger",
)
"""Blocks that do nothing unless ``enabled`` is true."""
INERT_KEYS = {
    "checkpoint": "checkpoints are this project's own, see sparse_llama.training.save_every",
    "compile": "the model is not compiled",
    "dataloader_drop_last": "the data loader is this project's own",
    "disable_allgather": "DeepSpeed reads it nowhere",
    "hybrid_engine": "it is off",
    "torch_autocast": "it is off",
    "vocabulary_size": "the model's own is used",
    "zero_force_ds_cpu_optimizer": "it is about optimizers made in code, and this one is from the document",
}
"""Top-level keys that nothing reads, whatever they hold, with the reason; values that would act are refused
earlier."""
_ALONE_KEYS = {
    "seq_parallel_communication_data_type": "there is one sequence-parallel rank",
    "sequence_parallel_size": "1 is no sequence parallelism",
}
_SHARED_KEYS = {
    "communication_data_type": "where ranks share rows, seq_parallel_communication_data_type is read (fp32)",
}
LOGGED_KEYS = ("comms_logger", "dump_state", "steps_per_print", "wall_clock_breakdown")
"""Top-level keys that write to DeepSpeed's log, which is off unless ``log_level`` turns it on."""
_NVME_ONLY = (
    "nvme_path",
    "buffer_count",
    "buffer_size",
    "max_in_cpu",
    "pipeline_read",
    "pipeline_write",
    "fast_init",
)


def find_notices(
    file: Mapping[str, Any],
    merged: Mapping[str, Any],
    checked: Document,
    layouts: LayerSparsities,
    flags: Overrides,
) -> tuple[str, ...]:
    """Return a line for everything in the document that this run does not act on.

    Args:
        file: the document before, ``merged`` after the flags; ``checked`` is ``merged`` parsed.
    """
    found = [
        *_blocks(merged, checked),
        *_zero(merged.get("zero_optimization", {})),
        *_schedule(merged, checked),
    ]
    found += _attention(file, merged, layouts, flags)
    found += _checkpoints(checked)
    found += _settings(merged.get("sparse_llama", {}), checked.sparse_llama)
    found += _grouping(merged, checked.sparse_llama)
    return tuple(dict.fromkeys(found))


def drop_inert(deepspeed: dict[str, Any]) -> None:
    """Delete from the dict for DeepSpeed what has no effect, so that it cannot start to have one."""
    for key in _inert_keys(deepspeed):
        deepspeed.pop(key, None)
    for key in SWITCHED_BLOCKS:
        if not _is_on(deepspeed.get(key)):
            deepspeed.pop(key, None)
    if not _logs(deepspeed):
        for key in LOGGED_KEYS:
            deepspeed.pop(key, None)
    zero = deepspeed["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device", "none") == "none" or (
            name == "offload_param" and zero["stage"] < 3
        ):
            zero.pop(name, None)
    for key in [*UNUSED_KEYS, *(STAGE3_KEYS if zero["stage"] < 3 else ())]:
        zero.pop(key, None)
    if not _uses_nvme(zero):
        deepspeed.pop("aio", None)


def _inert_keys(document: Mapping[str, Any]) -> dict[str, str]:
    shares = document.get("sequence_parallel_size", 1) > 1
    return INERT_KEYS | (_SHARED_KEYS if shares else _ALONE_KEYS)


def _blocks(merged: Mapping[str, Any], checked: Document) -> Iterator[str]:
    for key in SWITCHED_BLOCKS:
        if key in merged and not _is_on(merged[key]):
            why = "it is off" if "enabled" in merged[key] else 'it is off without "enabled": true'
            yield f"{key}: no effect; {why}"
    for key in LOGGED_KEYS:
        if _is_on(merged.get(key)) and not _logs(merged):
            yield f'{key}: no effect; DeepSpeed\'s log is off without "log_level": "info"'
    for key, why in _inert_keys(merged).items():
        if merged.get(key) is not None:
            yield f"{key}: no effect; {why}"
    if merged.get("aio") is not None and not _uses_nvme(merged.get("zero_optimization", {})):
        yield "aio: no effect; nothing is offloaded to nvme"


def _zero(zero: Mapping[str, Any]) -> Iterator[str]:
    stage = zero.get("stage", 0)
    for name in ("offload_optimizer", "offload_param"):
        block = zero.get(name) or {}
        device = block.get("device", "none")
        unused = [key for key in _NVME_ONLY if key in block] if device == "cpu" else []
        if device == "none" and block:
            yield f'zero_optimization.{name}: no effect; its device is "none"'
        elif name == "offload_param" and block and stage < 3:
            yield f"zero_optimization.{name}: no effect at stage {stage}; stage 3 offloads parameters"
        elif unused:
            yield f"zero_optimization.{name}: no effect of {', '.join(unused)}; only nvme uses them"
        if "cpuadam_cores_perc" in block:
            yield f"zero_optimization.{name}.cpuadam_cores_perc: no effect; it belongs to super_offload"
    for key, why in UNUSED_KEYS.items():
        if key in zero:
            yield f"zero_optimization.{key}: no effect; {why}"
    offload = {"offload_optimizer", "offload_param", "stage", *UNUSED_KEYS}
    if stage == 0:
        unread = [key for key in zero if key not in offload]
        if unread:
            yield f"zero_optimization: no effect of {', '.join(unread)}; stage 0 switches ZeRO off"
    elif stage < 3:
        unread = [key for key in zero if key in STAGE3_KEYS and key not in offload]
        if unread:
            keys = ", ".join(unread)
            yield f"zero_optimization: no effect of {keys} at stage {stage}; only stage 3 reads them"


def _checkpoints(checked: Document) -> Iterator[str]:
    if checked.sparse_llama.memory.checkpoint_nvme_path is None:
        return
    block = checked.activation_checkpointing
    if block is None or not block.cpu_checkpointing:
        why = "no layer is checkpointed" if block is None else "layer inputs stay on the device"
        yield (
            f"sparse_llama.memory.checkpoint_nvme_path: no effect; {why} without "
            '"activation_checkpointing": {"cpu_checkpointing": true}'
        )


def _schedule(merged: Mapping[str, Any], checked: Document) -> Iterator[str]:
    scheduler = merged.get("scheduler") or {}
    params = scheduler.get("params", {})
    lr = (merged.get("optimizer") or {}).get("params", {}).get("lr")
    peak, total, steps = (
        params.get("warmup_max_lr"),
        params.get("total_num_steps"),
        checked.sparse_llama.training.steps,
    )
    if lr is not None and scheduler.get("type") in ("OneCycle", "LRRangeTest"):
        yield f"optimizer.params.lr: no effect; scheduler {scheduler['type']} sets the learning rate"
    if lr is not None and peak not in (None, AUTO, lr):
        yield (
            f"optimizer.params.lr: no effect; scheduler.params.warmup_max_lr, {peak}, wins; "
            'make it "auto" to agree'
        )
    if steps is not None and total not in (None, AUTO, steps):
        yield (
            f"scheduler.params.total_num_steps: {total}, but the run has {steps} steps; "
            '"auto" follows the run'
        )


def _attention(
    file: Mapping[str, Any], merged: Mapping[str, Any], layouts: LayerSparsities, flags: Overrides
) -> Iterator[str]:
    if flags.attention == "dense":
        if file.get("sparse_attention") is not None:
            yield "sparse_attention: no effect with --attention dense"
        if file.get("sparse_llama", {}).get("attention", {}).get("layouts"):
            yield "sparse_llama.attention.layouts: no effect with --attention dense"
    if layouts.is_dense:
        for key in ("master_length", "dense_layers"):
            if key in merged.get("sparse_llama", {}).get("attention", {}):
                yield f"sparse_llama.attention.{key}: no effect on dense attention"
    yield from _unread(merged)
    for sparsity in layouts.distinct:
        yield from _sparsity(sparsity)


def _unread(merged: Mapping[str, Any]) -> Iterator[str]:
    by_layer = merged.get("sparse_llama", {}).get("attention", {}).get("layouts", ())
    for block in (merged.get("sparse_attention", {}), *(one["sparse_attention"] for one in by_layer)):
        if is_neox(block):
            if unread := unread_options(block):
                keys = ", ".join(unread)
                yield f"sparse_attention.sparsity_config: no effect of {keys}; GPT-NeoX reads none"
        elif unread := unread_keys(block):
            keys, mode = ", ".join(unread), block.get("mode", "fixed")
            yield f"sparse_attention: no effect of {keys}; mode {mode!r} does not read them"


def _sparsity(sparsity: Sparsity) -> Iterator[str]:
    if getattr(sparsity, "attention", None) == "bidirectional":
        yield (
            'sparse_attention.attention: "bidirectional" keeps its blocks, but no token of a causal model '
            "sees a later one: the causal mask is intersected"
        )
    patterns = getattr(sparsity, "num_different_global_patterns", 1) + getattr(
        sparsity, "num_random_blocks", 0
    )
    if getattr(sparsity, "different_layout_per_head", False) and patterns == 1:
        yield "sparse_attention.different_layout_per_head: no effect; this layout is the same for all heads"


def _settings(block: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    data, model, training = settings.data, settings.model, settings.training
    if data.validation is not None:
        for key in ("validation_records", "split_seed"):
            if key in block.get("data", {}):
                yield f"sparse_llama.data.{key}: no effect; validation is given"
    if data.cache_dir is not None and not data.cache:
        yield "sparse_llama.data.cache_dir: no effect; cache is false"
    if model.revision is not None and model.path.startswith("bundled:"):
        yield "sparse_llama.model.revision: no effect; the model is bundled"
    if (
        training.samples == 0
        and training.exact_match_records == 0
        and "max_new_tokens" in block.get("training", {})
    ):
        yield "sparse_llama.training.max_new_tokens: no effect; samples and exact_match_records are 0"


def _grouping(merged: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    if not settings.data.group_by_length:
        return
    if settings.data.packing:
        yield "sparse_llama.data.group_by_length: no effect; packed rows are all of one length"
    elif merged.get("train_batch_size") == merged.get("train_micro_batch_size_per_gpu") is not None:
        yield "sparse_llama.data.group_by_length: no effect; a step is one micro-batch"


def _is_on(value: object) -> bool:
    """Return whether a key is given and neither false nor a block that is not enabled."""
    return bool(value.get("enabled", False)) if isinstance(value, Mapping) else bool(value)


def _logs(merged: Mapping[str, Any]) -> bool:
    return merged.get("log_level") in ("debug", "info")


def _uses_nvme(zero: Mapping[str, Any]) -> bool:
    return zero.get("stage", 0) == 3 and any(
        (zero.get(name) or {}).get("device") == "nvme" for name in ("offload_optimizer", "offload_param")
    )
