"""When a run saves, what it keeps, and what it does where it cannot."""

from pathlib import Path
from typing import NoReturn

from rich.console import Console

from sparse_llama.distributed import ranks
from sparse_llama.errors import CheckpointError, StoppedError
from sparse_llama.training.checkpoint import (
    Position,
    checkpoint_name,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    step_of,
)
from sparse_llama.training.metrics import read_step_lines
from sparse_llama.training.moment import SAVING, Moment
from sparse_llama.training.session import Session

VALIDATIONS = "validation.jsonl"


class Saves:
    """The checkpoints of a run as it goes on; all ranks call each method."""

    def __init__(self, session: Session, console: Console, moment: Moment) -> None:
        self._session, self._console, self.moment = session, console, moment
        self.is_withheld = False
        """Whether what has been trained since the newest checkpoint is worth nothing."""
        self.folder = session.run.output_dir / "checkpoints"

    def now(self, position: Position) -> Path:
        """Save ``position`` unless that is done, and return the checkpoint.

        Raises:
            CheckpointError: it cannot be written.
        """
        target = self.folder / checkpoint_name(position.step)
        if not self.has(position):
            self.moment.enter(SAVING)
            session = self._session
            save_checkpoint(self.folder, session.engine, session.parameters, session.adapter, position)
            self.prune()
        return target

    def has(self, position: Position) -> bool:
        """Return whether the checkpoint at ``position`` is there, the same on every rank."""
        return bool(ranks.from_main((self.folder / checkpoint_name(position.step)).exists()))

    def try_now(self, position: Position) -> None:
        """Save ``position``; where that fails, say so, and let the run go on: there may be room at the next
        save, and to end now would lose the steps since the last one for certain."""
        try:
            self.now(position)
        except CheckpointError as error:
            newest = self.newest()
            kept = f"the newest checkpoint is {newest.name}" if newest else "there is no checkpoint yet"
            told = f"note: {error}; {kept}; make room before the next save"
            self._console.print(told, style="bold red")

    def stop(self, position: Position, reason: str) -> NoReturn:
        """End a run before its end, with every finished step saved.

        Raises:
            StoppedError: always.
        """
        if position.step == 0:
            raise StoppedError(f"{reason}: before the first step, there is nothing to save")
        if self.is_withheld:
            newest = self.newest()
            then = f"{newest} is from before that" if newest else "there is no checkpoint"
            raise StoppedError(
                f"{reason}: after step {position.step}, which is not saved: its loss or its gradient is no "
                f"number, or worse than guessing; {then}"
            )
        checkpoint = self.now(position)
        raise StoppedError(
            f"{reason}: after step {position.step}, {checkpoint} is saved; the same command with --resume "
            "goes on"
        )

    def newest(self) -> Path | None:
        """Return the newest checkpoint of this run; None where there is none."""
        return newest_checkpoint(self.folder)

    def prune(self) -> None:
        """Delete what is not to be kept."""
        training = self._session.run.settings.training
        if ranks.is_main():
            prune_checkpoints(self.folder, training.keep_last, self.best())

    def best(self) -> tuple[int, ...]:
        """Return the steps of the ``keep_best`` checkpoints with the lowest validation losses, the best
        first."""
        losses = validation_losses(self._session.run.output_dir)
        steps = [step for path in list_checkpoints(self.folder) if (step := step_of(path)) in losses]
        ordered = sorted(steps, key=lambda step: (losses[step], step))
        return tuple(ordered[: self._session.run.settings.training.keep_best])


def validation_losses(output_dir: Path) -> dict[int, float]:
    """Return the validation loss after each step that was followed by a validation."""
    return {line["step"]: line["loss"] for line in read_step_lines(output_dir / VALIDATIONS)}
