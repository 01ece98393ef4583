"""The flags that override a document for one run."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparse_llama.config.paths import exists
from sparse_llama.config.settings import check_dataset, check_model
from sparse_llama.errors import ConfigError

VERSIONS = ("v1", "v2")
OFFLOADS = ("none", "cpu", "nvme")
CHECKPOINTINGS = ("none", "gpu", "cpu", "nvme")
ROPES = ("linear", "dynamic", "yarn")
"""Types of ``rope_parameters`` that need a factor and nothing else, so that a flag can ask for them."""
LEVERS = ("loss_tile", "mlp_tile", "norm_tile", "head_groups")
"""Keys of ``sparse_llama.memory`` that are numbers; as a flag, 0 switches one off."""


@dataclass(frozen=True)
class Overrides:
    """The value of every flag of a run; None is a flag that was not given."""

    zero_stage: int | None = None
    offload: Literal["none", "cpu", "nvme"] | None = None
    nvme_path: Path | None = None
    checkpointing: Literal["none", "gpu", "cpu", "nvme"] | None = None
    """Whether layers are checkpointed, and where their inputs wait; gpu is where the model computes."""
    number_checkpoints: int | None = None
    loss_tile: int | None = None
    mlp_tile: int | None = None
    norm_tile: int | None = None
    head_groups: int | Literal["auto"] | None = None
    seq_length: int | None = None
    micro_batch_size: int | None = None
    """Rows in the model at a time; a step keeps its rows, in more or fewer micro-batches."""
    rope: Literal["linear", "dynamic", "yarn"] | None = None
    """How positions are stretched to ``seq_length``."""
    attention: Literal["dense", "sparse"] | None = None
    adapter: str | None = None
    """A version, or the path of an adapter to train on from."""
    model: str | None = None
    dataset: str | None = None
    output_dir: Path | None = None
    steps: int | None = None
    epochs: int | None = None
    save_every: int | None = None
    time_budget_s: float | None = None
    lr: float | None = None
    seed: int | None = None
    resume: Literal["auto"] | Path | None = None
    overwrite: bool = False


def check_flags(flags: Overrides) -> None:
    """Refuse flags that are wrong whatever the document says.

    Raises:
        ConfigError: a value out of range, or two flags that exclude each other.
    """
    at_least = {"seq_length": 2, "seed": 0}
    counts = ("steps", "epochs", "save_every", "number_checkpoints", "micro_batch_size")
    at_least |= dict.fromkeys(counts, 1)
    for name, least in (at_least | dict.fromkeys(LEVERS, 0)).items():
        value = getattr(flags, name)
        if value not in (None, "auto") and not least <= value < 2**63:
            raise ConfigError(f"--{name}: must be >= {least} and < 2**63, got {value}")
    for name in ("lr", "time_budget_s"):
        value = getattr(flags, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name}: must be > 0, got {value}")
    choices: tuple[tuple[str, tuple[object, ...]], ...] = (
        ("zero_stage", (0, 1, 2, 3)),
        ("offload", OFFLOADS),
        ("checkpointing", CHECKPOINTINGS),
        ("rope", ROPES),
        ("attention", ("dense", "sparse")),
    )
    for name, allowed in choices:
        value = getattr(flags, name)
        if value is not None and value not in allowed:
            raise ConfigError(f"--{name}: must be one of {', '.join(map(str, allowed))}, got {value}")
    if flags.adapter not in (None, *VERSIONS) and not exists(Path(flags.adapter)):
        raise ConfigError(
            f"--adapter: must be {', '.join(VERSIONS)} or the path of an adapter to train on from, got "
            f"{flags.adapter}"
        )
    for name, check in (("model", check_model), ("dataset", check_dataset)):
        value = getattr(flags, name)
        if value is not None:
            try:
                check(value)
            except ValueError as error:
                raise ConfigError(f"--{name}: {error}") from None
    if flags.steps is not None and flags.epochs is not None:
        raise ConfigError("--steps and --epochs exclude each other; give one of them")
    if flags.resume is not None and flags.overwrite:
        raise ConfigError("--resume continues a run and --overwrite replaces it; give one of them")


def apply_flags(document: Mapping[str, Any], flags: Overrides) -> dict[str, Any]:
    """Return a checked ``document`` with ``flags`` in it.

    ``--model`` and ``--dataset`` also drop what belonged to the replaced one: its revision, its validation
    set, the names of its splits and the number of records to split off. ``--steps`` replaces ``epochs`` and
    the other way round.

    Raises:
        ConfigError: a flag that this document gives no meaning to.
    """
    merged = copy.deepcopy(dict(document))
    settings = merged.setdefault("sparse_llama", {})
    for name in ("seq_length", "seed"):
        if getattr(flags, name) is not None:
            settings[name] = getattr(flags, name)
    if flags.adapter in VERSIONS:
        settings.setdefault("adapter", {})["version"] = flags.adapter
    elif flags.adapter is not None:
        settings.pop("adapter", None)
        settings.setdefault("training", {})["init_adapter"] = flags.adapter
    if flags.model is not None:
        model = settings.setdefault("model", {})
        model["path"] = flags.model
        model.pop("revision", None)
    if flags.rope is not None:
        rope = {"rope_type": flags.rope, "factor": "auto"}
        settings.setdefault("model", {})["rope_parameters"] = rope
    if flags.dataset is not None:
        data = settings.setdefault("data", {})
        data["dataset"] = flags.dataset
        for key in ("validation", "validation_records", "training_split", "validation_split"):
            data.pop(key, None)
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if getattr(flags, name) is not None:
            training = settings.setdefault("training", {})
            training[name] = getattr(flags, name)
            training.pop(other, None)
    for name in ("save_every", "time_budget_s"):
        if getattr(flags, name) is not None:
            settings.setdefault("training", {})[name] = getattr(flags, name)
    has_layouts = bool(settings.get("attention", {}).get("layouts"))
    if flags.attention == "dense":
        merged.pop("sparse_attention", None)
        settings.get("attention", {}).pop("layouts", None)
    elif flags.attention == "sparse" and merged.get("sparse_attention") is None and not has_layouts:
        raise ConfigError(
            "--attention sparse: the document has no sparse_attention block; add one, such as "
            '"sparse_attention": {"mode": "bslongformer", "num_sliding_window_blocks": 15, "attention": '
            '"unidirectional"}'
        )
    if flags.lr is not None:
        _apply_lr(merged, flags.lr)
    if flags.micro_batch_size is not None:
        _apply_micro_batch_size(merged, flags.micro_batch_size)
    _apply_zero(merged, flags)
    _apply_memory(merged, flags)
    _apply_nvme_path(merged, flags)
    return merged


def _apply_micro_batch_size(merged: dict[str, Any], size: int) -> None:
    """Cut the rows of a step into micro-batches of ``size`` rows."""
    micro, accumulation = (
        merged.get(key) for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    merged["train_micro_batch_size_per_gpu"] = size
    if merged.get("train_batch_size") is not None:
        merged.pop("gradient_accumulation_steps", None)  # follows from the other two
        return
    if micro is None:
        return  # refused with the other batch sizes
    rows = micro * (accumulation or 1)
    if rows % size:
        divisors = ", ".join(str(number) for number in range(1, rows + 1) if rows % number == 0)
        raise ConfigError(
            f"--micro_batch_size {size}: does not divide the {rows} rows that a step has on each rank; use "
            f"one of {divisors}"
        )
    merged["gradient_accumulation_steps"] = rows // size


def _apply_memory(merged: dict[str, Any], flags: Overrides) -> None:
    memory = merged["sparse_llama"].setdefault("memory", {})
    for name in LEVERS:
        value = getattr(flags, name)
        if value is not None:
            memory[name] = value or None
    if flags.checkpointing == "none":
        merged.pop("activation_checkpointing", None)
    elif flags.checkpointing is not None:
        block = merged.setdefault("activation_checkpointing", {})
        block["cpu_checkpointing"] = flags.checkpointing != "gpu"
    if flags.checkpointing not in (None, "nvme"):
        memory.pop("checkpoint_nvme_path", None)
    elif flags.checkpointing == "nvme" and flags.nvme_path is None and not memory.get("checkpoint_nvme_path"):
        raise ConfigError("--checkpointing nvme: needs a folder on the drive; add --nvme_path FOLDER")
    if flags.number_checkpoints is not None:
        if "activation_checkpointing" not in merged:
            raise ConfigError(
                f"--number_checkpoints {flags.number_checkpoints}: the document checkpoints no layer; add "
                "--checkpointing gpu or cpu"
            )
        merged["activation_checkpointing"]["number_checkpoints"] = flags.number_checkpoints


def _apply_nvme_path(merged: dict[str, Any], flags: Overrides) -> None:
    """Put ``--nvme_path`` wherever something goes to the drive."""
    if flags.nvme_path is None:
        return
    zero = merged["zero_optimization"]
    used = [name for name in ("offload_optimizer", "offload_param") if _device(zero, name) == "nvme"]
    for name in used:
        zero[name]["nvme_path"] = str(flags.nvme_path)
    memory = merged["sparse_llama"]["memory"]
    if flags.checkpointing == "nvme" or memory.get("checkpoint_nvme_path"):
        memory["checkpoint_nvme_path"] = str(flags.nvme_path)
    elif not used:
        raise ConfigError(
            f"--nvme_path {flags.nvme_path}: nothing is offloaded to nvme; add --offload nvme or "
            "--checkpointing nvme"
        )


def _apply_lr(merged: dict[str, Any], lr: float) -> None:
    scheduler = merged.get("scheduler") or {}
    if scheduler.get("type") in ("OneCycle", "LRRangeTest"):
        raise ConfigError(
            f"--lr: scheduler {scheduler['type']} sets the learning rate by its own parameters; edit those"
        )
    peak = scheduler.get("params", {}).get("warmup_max_lr")
    if peak not in (None, "auto") and peak != lr:
        raise ConfigError(
            f'--lr {lr}: scheduler.params.warmup_max_lr is {peak} and would win; make it "auto"'
        )
    optimizer = merged.get("optimizer")
    if optimizer is None:
        from sparse_llama.config.optimizer import default_optimizer

        optimizer = default_optimizer()
        merged["optimizer"] = optimizer
    optimizer.setdefault("params", {})["lr"] = lr


def _apply_zero(merged: dict[str, Any], flags: Overrides) -> None:
    zero = merged.setdefault("zero_optimization", {})
    if flags.zero_stage is not None:
        zero["stage"] = flags.zero_stage
    stage, device = zero.get("stage", 0), flags.offload
    if device is not None:
        if device == "none":
            zero.pop("offload_optimizer", None)
            zero.pop("offload_param", None)
        elif stage == 0 or (device == "nvme" and stage < 3):
            raise ConfigError(
                f"--offload {device}: not at ZeRO stage {stage}; stages 1 and 2 offload the optimizer to "
                "cpu, stage 3 "
                "optimizer and parameters to cpu or nvme; add --zero_stage "
                f"{3 if device == 'nvme' else '1, 2 or 3'}"
            )
        else:
            if stage < 3:
                zero.pop("offload_param", None)
            for name in ("offload_optimizer", "offload_param") if stage == 3 else ("offload_optimizer",):
                _offload_to(zero, name, device, flags.nvme_path)


_NVME_KEYS = (
    "nvme_path",
    "buffer_count",
    "buffer_size",
    "max_in_cpu",
    "pipeline_read",
    "pipeline_write",
    "fast_init",
)


def _offload_to(zero: dict[str, Any], name: str, device: str, nvme_path: Path | None) -> None:
    block = dict(zero.get(name) or {})
    if device == "cpu":
        for key in _NVME_KEYS:
            block.pop(key, None)
    elif nvme_path is None and block.get("nvme_path") is None:
        raise ConfigError("--offload nvme: needs a folder on the drive; add --nvme_path FOLDER")
    zero[name] = block | {"device": device}


def _device(zero: Mapping[str, Any], name: str) -> str:
    return (zero.get(name) or {}).get("device", "none")
