"""A run's output folder: one job's own while it trains, and written to so that a full drive is a message."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from sparse_llama.adapters.weights import CONFIG_NAME, WEIGHTS_NAME
from sparse_llama.distributed import ranks
from sparse_llama.errors import CheckpointError, ConfigError
from sparse_llama.training.durable import remove

_LOCK = ".lock"


class OutputFolder:
    """A run's folder, which other runs are kept out of: two that write to one leave neither whole.

    The system lets go of the lock when the process ends, however it ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: TextIO | None = None

    def __enter__(self) -> Self:
        """Take the folder if it is there: a mistake later on must not leave one behind."""
        if ranks.from_main(self.path.is_dir()):
            self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.close()

    def take(self) -> None:
        """Make the folder, and lock it; does nothing the second time. Every rank must call it.

        Raises:
            ConfigError: on every rank, where another process trains there, or it cannot be written to.
        """
        mistake = self._lock() if ranks.is_main() and self._handle is None else None
        if ranks.from_main(mistake is not None):
            raise ConfigError(f"{self.path}: {mistake or 'see the main rank'}")

    def _lock(self) -> str | None:
        handle = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / _LOCK).open("w", encoding="utf-8")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if handle is not None:
                handle.close()
            if isinstance(error, BlockingIOError):
                return "another process is training there; wait for it, or name another --output_dir"
            return f"cannot be written ({error.strerror}); name another --output_dir"
        self._handle = handle
        return None


@contextmanager
def writing(output_dir: Path) -> Iterator[None]:
    """Let the main rank write in the block; every rank must come through it.

    Raises:
        CheckpointError: on every rank, where the drive is full or read-only; checkpoints are not touched.
    """
    mistake = None
    try:
        yield
    except OSError as error:
        mistake = error.strerror or str(error)
    if ranks.from_main(mistake is not None):
        raise CheckpointError(
            f"{output_dir}: cannot be written ({mistake or 'see the main rank'}); checkpoints there are "
            "whole: make room, and go on with --resume"
        )


def publish_adapter(checkpoint: Path, output_dir: Path) -> None:
    """Put the adapter of ``checkpoint`` into ``output_dir/adapter``, both files at once."""
    adapter = output_dir / "adapter"
    unfinished = output_dir / ".adapter.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        shutil.copyfile(checkpoint / name, unfinished / name)
    if adapter.exists():
        remove(adapter)
    unfinished.rename(adapter)
