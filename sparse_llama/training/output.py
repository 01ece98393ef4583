"""A run's output folder: one job's own while it trains, and written to so that a full drive is a message."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_llama.adapters.weights import CONFIG_NAME, WEIGHTS_NAME
from sparse_llama.distributed import ranks
from sparse_llama.errors import CheckpointError, ConfigError
from sparse_llama.training.durable import remove

_LOCK = ".lock"


@contextmanager
def sole_user(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of the folder meanwhile: two that write to one leave neither whole.

    The system lets go of the lock when the process ends, however it ends.

    Raises:
        ConfigError: on every rank, where another process trains there, or the folder cannot be written to.
    """
    mistake, handle = None, None
    if ranks.is_main():
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            handle = (output_dir / _LOCK).open("w", encoding="utf-8")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mistake = "another process is training there; wait for it, or name another --output_dir"
        except OSError as error:
            mistake = f"cannot be written ({error.strerror}); name another --output_dir"
    try:
        if ranks.from_main(mistake is not None):
            raise ConfigError(f"{output_dir}: {mistake or 'see the main rank'}")
        yield
    finally:
        if handle is not None:
            handle.close()


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
