"""Checkpoints of a run: the trainable tensors, the optimizer, the random state and the position; megabytes,
no pickle.

``checkpoints/step_000123/`` holds an adapter folder (``adapter.safetensors`` with the fp32 masters and
``adapter_config.json``, so every checkpoint can be evaluated and exported as it is),
``optimizer.safetensors`` with the moments, and ``state.json``. Masters and moments are whole tensors: a
checkpoint fits any ZeRO stage and number of ranks. A folder appears under its name only when it is complete.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sparse_llama.adapters.weights import AdapterFile, read_adapter_folder, write_adapter_folder
from sparse_llama.distributed.ranks import barrier, is_main
from sparse_llama.errors import CheckpointError
from sparse_llama.training.masters import (
    read_masters,
    read_moments,
    read_optimizer_step,
    write_masters,
    write_moments,
)

_FORMAT_VERSION = 1


@dataclass
class Position:
    """Where a run stands after a step, and the sums that its summary needs."""

    step: int = 0
    loss_sum: float = 0.0
    labelled_tokens: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    before: dict[str, Any] | None = (
        None  # validation before training, so that a resumed run can still compare
    )


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after ``step`` steps."""
    return f"step_{step:06d}"


def save_checkpoint(
    folder: Path, engine: Any, parameters: dict[str, nn.Parameter], adapter: AdapterFile, position: Position
) -> Path:
    """Write ``folder/step_NNNNNN`` and return it; every rank must call it."""
    target = folder / checkpoint_name(position.step)
    masters = read_masters(engine, parameters)
    moments = read_moments(engine, parameters)
    updates = read_optimizer_step(engine)
    if is_main():
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_adapter_folder(unfinished, masters, adapter)
        random_state = {"random_state/cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_state["random_state/cuda"] = torch.cuda.get_rng_state()
        save_file(moments | random_state, unfinished / "optimizer.safetensors")
        state = {
            "format_version": _FORMAT_VERSION,
            "optimizer_updates": updates,
            "position": asdict(position),
        }
        (unfinished / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    barrier()
    return target


def load_checkpoint(folder: Path, engine: Any, parameters: dict[str, nn.Parameter]) -> Position:
    """Put a checkpoint's tensors into the engine and return where the run stood.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not those of this run.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        moments = load_file(folder / "optimizer.safetensors")
        position = Position(**state["position"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: not a readable checkpoint ({type(error).__name__}: {error}); "
            "name an older one with --resume DIR, or start anew with --overwrite"
        ) from error
    _, masters = read_adapter_folder(folder)
    check_tensors(str(folder), masters, parameters)
    torch.set_rng_state(moments.pop("random_state/cpu"))
    cuda_state = moments.pop("random_state/cuda", None)
    if cuda_state is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_state)
    write_masters(engine, parameters, masters)
    write_moments(engine, parameters, moments, state["optimizer_updates"])
    _set_schedule(engine, position.step)
    engine.global_steps = position.step
    return position


def _set_schedule(engine: Any, step: int) -> None:
    """Put the learning rates where ``step`` finished steps leave them."""
    scheduler = engine.lr_scheduler
    if isinstance(scheduler, LambdaLR):
        rates = [
            base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        state = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        scheduler.load_state_dict(scheduler.state_dict() | state)
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    elif scheduler is not None:  # DeepSpeed's own take the number of the last finished step, counted from 0
        scheduler.step(step - 1)


def find_checkpoint(folder: Path, resume: Literal["auto"] | Path) -> Path:
    """Return the checkpoint that ``--resume`` means: the newest in ``folder`` for ``auto``, else the named
    one.

    Raises:
        CheckpointError: there is none.
    """
    if resume != "auto":
        if not (resume / "state.json").is_file():
            raise CheckpointError(
                f"--resume {resume}: no checkpoint there (no state.json); name a step_NNNNNN folder, or use "
                "--resume alone"
            )
        return resume
    steps = list_checkpoints(folder)
    if not steps:
        raise CheckpointError(
            f"--resume: no checkpoint under {folder}; start anew without --resume, with --overwrite"
        )
    return steps[-1]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def prune_checkpoints(folder: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints."""
    if is_main():
        for path in list_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(path)


def check_tensors(source: str, masters: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """Refuse tensors that are not those of a run.

    Raises:
        CheckpointError: one is missing, unknown, or of another shape.
    """
    wanted = {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters.items()
    }
    found = {name: tuple(tensor.shape) for name, tensor in masters.items()}
    if wanted != found:
        name = sorted(wanted.items() ^ found.items())[0][0]
        raise CheckpointError(
            f"{source}: {name} is {found.get(name, 'missing')} there and {wanted.get(name, 'missing')} in "
            "this run; it was trained with another configuration, or on another base"
        )
