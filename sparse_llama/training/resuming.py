"""From a checkpoint to a run that goes on as if it had never stopped."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_llama.adapters.weights import read_adapter_config
from sparse_llama.config.run import Run
from sparse_llama.distributed import ranks
from sparse_llama.errors import CheckpointError
from sparse_llama.model.rope import describe_positions
from sparse_llama.training.checkpoint import Position, find_checkpoint, load_checkpoint, set_aside
from sparse_llama.training.durable import MANIFEST
from sparse_llama.training.session import Session


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run goes on from."""

    folder: Path
    notes: tuple[str, ...]
    """Of newer ones that are damaged."""

    def manifest(self) -> str:
        """Return what all ranks must have found alike."""
        return (self.folder / MANIFEST).read_text(encoding="utf-8")


def find_start(run: Run) -> Start | None:
    """Return where a run goes on from, before anything is loaded; None is the beginning.

    Raises:
        CheckpointError: no whole checkpoint is there.
    """
    if run.resume is None:
        return None
    return Start(*find_checkpoint(run.output_dir / "checkpoints", run.resume))


def resume(session: Session, start: Start, console: Console) -> Position:
    """Put the checkpoint into the engine and return where the run stands; every rank must call it.

    Raises:
        CheckpointError: it is of another run, or beyond the end of this one.
    """
    position = load_checkpoint(start.folder, session.engine, session.parameters)
    if position.step > session.total_steps:
        raise CheckpointError(
            f"{start.folder}: stands at step {position.step}, beyond the {session.total_steps} of this run; "
            "give it more --steps or --epochs"
        )
    for note in start.notes:
        console.print(f"note: {note}", style="bold yellow")
    console.print(f"resuming from {start.folder}")
    for note in _changes(start.folder, session):
        console.print(f"note: it was trained with {note}", style="yellow")
    checkpoints = session.run.output_dir / "checkpoints"
    if ranks.is_main() and (aside := set_aside(checkpoints, position, start.folder)):
        console.print(
            f"note: checkpoints of step {position.step} and later are now in {aside}", style="yellow"
        )
    return position


def _changes(folder: Path, session: Session) -> list[str]:
    """Return what the checkpoint was trained with that this run is not."""
    before, now = read_adapter_config(folder), session.adapter
    compared: list[tuple[Any, Any, str]] = [
        (
            before.rope_parameters,
            now.rope_parameters,
            f"{describe_positions(before.rope_parameters)}, this run goes on with "
            f"{describe_positions(now.rope_parameters)}",
        ),
        (before.template, now.template, f"template {before.template}, this run goes on with {now.template}"),
        (before.layouts, now.layouts, f"attention {before.layouts}, this run goes on with {now.layouts}"),
        (
            before.seed,
            now.seed,
            f"seed {before.seed}, this run goes on with {now.seed}: other rows, other blocks",
        ),
        (
            before.seq_length,
            now.seq_length,
            f"rows of {before.seq_length} tokens, this run goes on with {now.seq_length}",
        ),
    ]
    return [words for old, new, words in compared if old != new]
