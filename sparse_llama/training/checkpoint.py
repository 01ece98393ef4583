"""Checkpoints of a run: the trainable tensors, the optimizer, the random state and the position; megabytes,
no pickle.

``checkpoints/step_000123/`` holds an adapter folder (``adapter.safetensors`` with the fp32 masters and
``adapter_config.json``, so every checkpoint can be evaluated and exported as it is),
``optimizer.safetensors`` with the moments, ``state.json``, and ``manifest.json`` over all of them. Masters
and moments are whole tensors: a checkpoint fits any ZeRO stage and number of ranks. A folder appears under
its name only when it is complete and was read back (``durable.py``); ``checkpoints/latest`` names the newest.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_llama.adapters.weights import AdapterFile, read_adapter_folder, write_adapter_folder
from sparse_llama.distributed import ranks
from sparse_llama.errors import CheckpointError
from sparse_llama.training.clocks import read_clocks, write_clocks
from sparse_llama.training.durable import find_damage, publish, remove, write_durably
from sparse_llama.training.masters import (
    read_masters,
    read_moments,
    read_optimizer_step,
    write_masters,
    write_moments,
)

LATEST = "latest"
"""The file beside the checkpoints that names the newest, as DeepSpeed's does."""
_FORMAT_VERSION = 2
_NAME = re.compile(r"step_\d{6,}")
_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"


@dataclass
class Position:
    """Where a run stands after a step, and the sums that its summary needs."""

    step: int = 0
    loss_sum: float = 0.0
    labelled_tokens: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    before: dict[str, Any] | None = None
    """The validation before training, so that a resumed run can still compare."""

    def advance(self, loss_sum: float, labelled_tokens: int, tokens: int, elapsed_s: float) -> None:
        """Take account of one more step, ``elapsed_s`` after the first began."""
        self.step += 1
        self.loss_sum += loss_sum
        self.labelled_tokens += labelled_tokens
        self.tokens += tokens
        self.elapsed_s = elapsed_s


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after ``step`` steps."""
    return f"step_{step:06d}"


def save_checkpoint(
    folder: Path, engine: Any, parameters: dict[str, nn.Parameter], adapter: AdapterFile, position: Position
) -> Path:
    """Write ``folder/step_NNNNNN`` and return it; every rank must call it.

    Raises:
        CheckpointError: on every rank, where the main one could not write it: the drive is full, say. No
            checkpoint of that name exists then, and all others are as they were.
    """
    target = folder / checkpoint_name(position.step)
    masters = read_masters(engine, parameters)
    optimizer = read_moments(engine, parameters)
    optimizer["random_state/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        optimizer["random_state/cuda"] = torch.cuda.get_rng_state()
    state = {
        "format_version": _FORMAT_VERSION,
        "optimizer_updates": read_optimizer_step(engine),
        "clocks": read_clocks(engine),
        "position": asdict(position),
    }
    reason = _write(target, masters, optimizer, state, adapter, parameters) if ranks.is_main() else None
    has_failed = torch.tensor(int(reason is not None), device=ranks.device())
    if bool(ranks.broadcast_from_main(has_failed)):
        raise CheckpointError(f"{target}: cannot be written ({reason or 'see the main rank'})")
    return target


def _write(
    target: Path,
    masters: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    state: dict[str, Any],
    adapter: AdapterFile,
    parameters: dict[str, nn.Parameter],
) -> str | None:
    """Write a checkpoint and return None, or why it could not be written."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        _sweep(target.parent)
        write_adapter_folder(unfinished, masters, adapter)
        save_file(optimizer, unfinished / _OPTIMIZER)
        (unfinished / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        _read_back(unfinished, masters, optimizer, parameters)
        publish(unfinished, target)
        write_durably(target.with_name(LATEST), f"{target.name}\n")
    except (OSError, SafetensorError, CheckpointError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        return getattr(error, "strerror", None) or " ".join(str(error).split())
    return None


def _read_back(
    folder: Path,
    masters: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    parameters: dict[str, nn.Parameter],
) -> None:
    """Compare what is in the files with what was to be saved.

    Under ZeRO-3 a parameter that was not gathered is an empty tensor, and is saved as one without an error;
    programs have lost whole runs to it. Here shapes come from the model, and bits from memory.
    """
    _, written = read_adapter_folder(folder)
    for name, shape in shapes_of(parameters).items():
        if tuple(written[name].shape) != shape:
            raise CheckpointError(f"{name} was written as {tuple(written[name].shape)}, and is {shape}")
    written |= load_file(folder / _OPTIMIZER)
    for name, tensor in (masters | optimizer).items():
        if not torch.equal(_bits(written[name]), _bits(tensor)):
            raise CheckpointError(f"{name} is not what was written; the drive or its memory is broken")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)  # a NaN equals itself


def _sweep(folder: Path) -> None:
    """Delete what killed processes have left unfinished."""
    for path in folder.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(folder: Path, engine: Any, parameters: dict[str, nn.Parameter]) -> Position:
    """Put a checkpoint's tensors into the engine and return where the run stood.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not those of this run.
    """
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if state["format_version"] != _FORMAT_VERSION:
            raise CheckpointError(
                f"{folder}: format_version {state['format_version']!r} is not one this version reads "
                f"({_FORMAT_VERSION}); go on with the sparse-llama that wrote it, or train on from its "
                f"adapter with --adapter {folder}"
            )
        saved = load_file(folder / _OPTIMIZER)
        position = Position(**state["position"])
        updates, clocks = int(state["optimizer_updates"]), dict(state["clocks"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: not a readable checkpoint ({type(error).__name__}: {error}); "
            "name an older one with --resume DIR, or start anew with --overwrite"
        ) from error
    _, masters = read_adapter_folder(folder)
    check_tensors(str(folder), masters, parameters)
    random_state = {name: saved.pop(name) for name in [*saved] if name.startswith("random_state/")}
    _check_moments(folder, saved, masters)
    torch.set_rng_state(random_state["random_state/cpu"])
    if "random_state/cuda" in random_state and torch.cuda.is_available():
        torch.cuda.set_rng_state(random_state["random_state/cuda"])
    write_masters(engine, parameters, masters)
    write_moments(engine, parameters, saved, updates)
    write_clocks(engine, clocks)
    engine.global_steps = position.step
    return position


def _check_moments(folder: Path, moments: dict[str, torch.Tensor], masters: dict[str, torch.Tensor]) -> None:
    kinds = {name.partition("/")[0] for name in moments}
    wanted = {f"{kind}/{name}": tensor.shape for kind in kinds for name, tensor in masters.items()}
    if {name: tensor.shape for name, tensor in moments.items()} != wanted:
        raise CheckpointError(
            f"{folder / _OPTIMIZER}: its tensors are not the moments of {folder.name}'s adapter; name an "
            f"older checkpoint with --resume DIR, or train on from its adapter with --adapter {folder}"
        )


def find_checkpoint(folder: Path, resume: Literal["auto"] | Path) -> tuple[Path, tuple[str, ...]]:
    """Return the checkpoint that ``--resume`` means, whole to the last bit, and what to say about those that
    are not: the newest whole one in ``folder`` for ``auto``, else the named one.

    Raises:
        CheckpointError: there is none.
    """
    if resume != "auto":
        damage = find_damage(resume)
        if damage is None:
            return resume, ()
        others = newest_intact(resume.parent)
        instead = f"the newest whole one is {others}" if others else "use --resume alone"
        raise CheckpointError(
            f"--resume {resume}: no whole checkpoint there ({damage}); name a step_NNNNNN folder: {instead}"
        )
    damaged: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(folder)):
        damage = find_damage(path)
        if damage is None:
            return path, tuple(f"{bad}: {why}; going on from {path.name}" for bad, why in damaged)
        damaged.append((path, damage))
    found = ", ".join(f"{path.name}: {why}" for path, why in damaged)
    raise CheckpointError(
        f"--resume: no {'whole ' if found else ''}checkpoint under {folder}{f' ({found})' if found else ''}; "
        "start anew without --resume, with --overwrite"
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, oldest first; whether they are whole is not looked at."""
    found = (path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in ``folder``, whole or not; None where there is none."""
    return next(reversed(list_checkpoints(folder)), None)


def newest_intact(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in ``folder``; None where there is none."""
    whole = (path for path in reversed(list_checkpoints(folder)) if find_damage(path) is None)
    return next(whole, None)


def step_of(checkpoint: Path) -> int:
    """Return the steps that a checkpoint stands after."""
    return int(checkpoint.name.removeprefix("step_"))


def set_aside(folder: Path, position: Position, start: Path) -> Path | None:
    """Move checkpoints that a run which goes on from ``start`` would come to again out of its way, and return
    where to; None where there are none.

    They are of another future of the run, or damaged: a run that was resumed from an older one must not find
    them as its newest.
    """
    later = [path for path in list_checkpoints(folder) if step_of(path) >= position.step]
    later = [path for path in later if not path.samefile(start)]
    if not later:
        return None
    aside = next(path for n in range(1, 10**6) if not (path := folder / f"set_aside_{n}").exists())
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    if start.resolve().parent == folder.resolve():
        write_durably(folder / LATEST, f"{start.name}\n")
    else:
        (folder / LATEST).unlink(missing_ok=True)
    return aside


def prune_checkpoints(folder: Path, keep_last: int, best: tuple[int, ...] = ()) -> None:
    """Delete all but the newest ``keep_last`` checkpoints, and those after the steps of ``best``."""
    for path in list_checkpoints(folder)[:-keep_last]:
        if step_of(path) not in best:
            remove(path)


def shapes_of(parameters: dict[str, nn.Parameter]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of whole parameters, also where ZeRO-3 has left this rank a part of each."""
    return {name: tuple(getattr(one, "ds_shape", one.shape)) for name, one in parameters.items()}


def check_tensors(source: str, masters: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """Refuse tensors that are not those of a run.

    Raises:
        CheckpointError: one is missing, unknown, or of another shape.
    """
    wanted = shapes_of(parameters)
    found = {name: tuple(tensor.shape) for name, tensor in masters.items()}
    if wanted != found:
        name = sorted(wanted.items() ^ found.items())[0][0]
        raise CheckpointError(
            f"{source}: {name} is {found.get(name, 'missing')} there and {wanted.get(name, 'missing')} in "
            "this run; it was trained with another configuration, or on another base"
        )
