"""A run: the document and the flags made one, checked to the last key, with everything that can be known
filled in."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from sparse_llama.config.combinations import (
    check_lengths,
    check_monitors,
    check_precision,
    check_shards,
    check_start,
    check_zero,
    resolve_batch,
)
from sparse_llama.config.deepspeed import OUR_BLOCKS, ActivationCheckpointing, check_document
from sparse_llama.config.document import read_document
from sparse_llama.config.flags import Overrides, apply_flags, check_flags
from sparse_llama.config.layers import LayerSparsities, LayoutOfLayers, layer_sparsities
from sparse_llama.config.notices import drop_inert, find_notices
from sparse_llama.config.optimizer import default_optimizer, parse_optimizer
from sparse_llama.config.paths import is_folder
from sparse_llama.config.schedule import Schedule, make_schedule
from sparse_llama.config.settings import Settings
from sparse_llama.errors import ConfigError

Checked = TypeVar("Checked")

__all__ = ["EMBEDDED", "Overrides", "Run", "check_output_dir", "load_run"]

EMBEDDED = Path(__file__).with_name("cpu_demo.json")
"""The document of a run without ``--ds_config``; ``ds_configs/cpu_demo.json`` is a copy."""


@dataclass(frozen=True)
class Run:
    """Everything a run is, resolved; what depends on the data (the number of steps of an epoch) is not in
    it."""

    name: str
    """The document's file name without its ending."""
    deepspeed: dict[str, Any]
    """For ``deepspeed.initialize``: DeepSpeed's own keys, all batch sizes given, without what has no
    effect."""
    layouts: LayerSparsities
    """Which layer attends by which layout."""
    settings: Settings
    """The ``sparse_llama`` block; ``attention.master_length`` and one of ``training.steps`` and ``epochs``
    are given."""
    schedule: Schedule | None
    """Resolved already if the steps are known; None where DeepSpeed runs its own (``OneCycle``,
    ``LRRangeTest``)."""
    output_dir: Path
    resume: Literal["auto"] | Path | None
    overwrite: bool
    notices: tuple[str, ...]
    """What in the document has no effect on this run, a line each."""
    config_path: Path

    @property
    def zero_stage(self) -> int:
        return self.deepspeed["zero_optimization"]["stage"]

    @property
    def offload(self) -> Literal["none", "cpu", "nvme"]:
        """Where the optimizer is offloaded to; where it stays, where the parameters are."""
        zero = self.deepspeed["zero_optimization"]
        return zero.get("offload_optimizer", zero.get("offload_param", {})).get("device", "none")

    @property
    def precision(self) -> Literal["bf16", "fp16", "fp32"]:
        if "bf16" in self.deepspeed:
            return "bf16"
        return "fp16" if "fp16" in self.deepspeed else "fp32"

    @property
    def micro_batch_size(self) -> int:
        return self.deepspeed["train_micro_batch_size_per_gpu"]

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.deepspeed["gradient_accumulation_steps"]

    @property
    def global_batch_size(self) -> int:
        """Rows of one optimizer step, over all ranks."""
        return self.deepspeed["train_batch_size"]

    @property
    def sequence_parallel_size(self) -> int:
        """Consecutive ranks that share each row among them."""
        return self.deepspeed.get("sequence_parallel_size", 1)

    @property
    def checkpointing(self) -> ActivationCheckpointing | None:
        """How layers are checkpointed; None is not at all."""
        block = self.deepspeed.get("activation_checkpointing")
        return None if block is None else ActivationCheckpointing.parse(block, "activation_checkpointing")

    def to_json(self) -> dict[str, Any]:
        """Return the resolved run as JSON holds it. No secrets: a document has none, and the environment is
        left out."""
        return {
            "name": self.name,
            "config_path": str(self.config_path),
            "deepspeed": copy.deepcopy(self.deepspeed),
            "sparse_attention": self.layouts.to_json()["sparse_attention"],
            "sparse_llama": self.settings.model_dump(mode="json"),
            "schedule": None if self.schedule is None else asdict(self.schedule),
            "output_dir": str(self.output_dir),
            "resume": None if self.resume is None else str(self.resume),
            "overwrite": self.overwrite,
            "notices": list(self.notices),
        }


def load_run(
    path: Path | None,
    overrides: Overrides,
    world_size: int,
    *,
    is_main: bool = True,
    is_here: bool = True,
) -> Run:
    """Return the run that a document and the flags describe.

    Args:
        path: of the JSON document; None is the embedded demo.
        world_size: processes of the job, which the batch sizes depend on.
        is_main: whether this is rank 0, which alone may look at the output folder: by the time that others
            look, it may have begun to write there.
        is_here: whether the run is to start on this machine, which must then have what it needs installed; a
            plan for another machine must not ask.

    Raises:
        ConfigError: in one line, what is wrong with the document, the flags, or both together.
    """
    assert world_size >= 1
    config_path = EMBEDDED if path is None else path
    label = "the embedded cpu_demo.json" if path is None else str(path)
    read = _in_file(label, lambda: read_document(config_path))
    written = _in_file(label, lambda: check_document(read)).sparse_llama
    file = _without_null(read)
    check_flags(overrides)
    merged = apply_flags(file, overrides)
    run = _in_file(
        label, lambda: _resolve(config_path, file, merged, overrides, world_size, written, is_here)
    )
    check_output_dir(run, is_main=is_main)
    return run


def check_output_dir(run: Run, *, is_main: bool) -> None:
    """Refuse an output folder that holds another run, unless this one continues or replaces it; and to resume
    where nothing is.

    Raises:
        ConfigError: as said; never on ranks other than the main one.
    """
    if not is_main:
        return
    _check_place(run.output_dir)
    if run.resume is None and not run.overwrite and (run.output_dir / "run.json").exists():
        raise ConfigError(
            f"{run.output_dir}: holds another run; continue it with --resume, replace it with --overwrite, "
            "or name another folder with --output_dir"
        )
    checkpoints = run.output_dir / "checkpoints"
    if run.resume == "auto" and not checkpoints.is_dir():
        raise ConfigError(
            f"--resume: {checkpoints} does not exist; leave --resume out, or name the run's folder with "
            "--output_dir"
        )
    if isinstance(run.resume, Path) and not is_folder(run.resume):
        raise ConfigError(
            f"--resume {run.resume}: no such folder; name that of a checkpoint, or use --resume alone"
        )


def _check_place(folder: Path) -> None:
    """Refuse an output folder that is a file, or that no folder can be: a name too long, or below a file."""
    try:
        folder.stat()
    except FileNotFoundError:
        return  # made when the run starts
    except OSError as error:
        raise ConfigError(
            f"--output_dir {folder}: cannot be a folder ({error.strerror}); name another"
        ) from None
    if not folder.is_dir():
        raise ConfigError(f"--output_dir {folder}: a file; name a folder")


def _resolve(
    config_path: Path,
    file: dict[str, Any],
    merged: dict[str, Any],
    flags: Overrides,
    world_size: int,
    written: Settings,
    is_here: bool,
) -> Run:
    checked = check_document(merged)
    settings = _fill_in(checked.sparse_llama, written)
    attention = settings.attention
    layouts = layer_sparsities(checked.sparse_attention, attention.layouts, attention.dense_layers)
    by_layer = tuple(map(LayoutOfLayers.parse, layouts.to_json()["layouts"]))  # GPT-NeoX's block translated
    attention = attention.model_copy(update={"layouts": by_layer})
    settings = settings.model_copy(update={"attention": attention})
    optimizer = default_optimizer() if checked.optimizer is None else parse_optimizer(merged["optimizer"])
    check_precision(checked)
    if is_here:
        check_monitors(checked)
    check_zero(checked, optimizer["type"], is_here=is_here)
    check_start(settings)
    check_lengths(settings, layouts)

    schedule = make_schedule(merged.get("scheduler"), lr=optimizer["params"]["lr"])
    if schedule is not None and settings.training.steps is not None:
        schedule = schedule.resolve(settings.training.steps)

    deepspeed = {key: value for key, value in copy.deepcopy(merged).items() if key not in OUR_BLOCKS}
    deepspeed |= resolve_batch(merged, world_size)
    check_shards(settings, checked.sequence_parallel_size)
    deepspeed["optimizer"] = optimizer
    deepspeed["gradient_clipping"] = checked.gradient_clipping
    deepspeed["zero_optimization"] = {"stage": checked.zero_optimization.stage} | deepspeed.get(
        "zero_optimization", {}
    )
    drop_inert(deepspeed)
    if schedule is not None:
        deepspeed.pop("scheduler", None)
    return Run(
        name=config_path.stem,
        deepspeed=deepspeed,
        layouts=layouts,
        settings=settings,
        schedule=schedule,
        output_dir=flags.output_dir or Path("runs") / config_path.stem,
        resume=flags.resume,
        overwrite=flags.overwrite,
        notices=find_notices(file, merged, checked, layouts, flags),
        config_path=config_path,
    )


def _fill_in(settings: Settings, written: Settings) -> Settings:
    """Return ``settings`` with the length of the run and of the master layout given.

    A shorter ``--seq_length`` crops the document's layout instead of making another: rows get shorter, not
    the pattern.
    """
    training = settings.training
    if training.steps is None and training.epochs is None:
        training = training.model_copy(update={"epochs": 1})
    attention = settings.attention
    if attention.master_length is None:
        longest = max(settings.seq_length, written.seq_length)
        attention = attention.model_copy(update={"master_length": longest})
    return settings.model_copy(update={"training": training, "attention": attention})


def _without_null(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``block`` without its nulls, which say "not given"; DeepSpeed takes some of them for values."""
    return {
        key: _without_null(value) if isinstance(value, Mapping) else value
        for key, value in block.items()
        if value is not None
    }


def _in_file(label: str, step: Callable[[], Checked]) -> Checked:
    """Return what ``step`` returns; what it refuses is told with the document's name."""
    try:
        return step()
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(f"{label}:") else f"{label}: {message}") from None
