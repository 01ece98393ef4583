"""Where an export goes to: nothing is under the output's name before it is complete."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_llama.adapters.interop import lit_llama, litgpt, llama_adapter
from sparse_llama.adapters.weights import CONFIG_NAME
from sparse_llama.errors import ExportError

# a folder with one of these is an export or a model; PEFT's configuration has the name of ours
_EXPORTS = (
    CONFIG_NAME,
    "config.json",
    lit_llama.FILE_NAME,
    *litgpt.FILE_NAMES.values(),
    llama_adapter.FILE_NAME,
)


def check_output(output: Path, *, overwrite: bool, sources: Iterable[Path]) -> None:
    """Refuse an output that would destroy something.

    Args:
        sources: folders that the export is read from.

    Raises:
        ExportError: the output is a source or holds one, is not empty, or, with ``overwrite``, holds
            something else than an export.
    """
    for source in sources:
        if source.resolve().is_relative_to(output.resolve()):
            raise ExportError(f"--output {output}: holds {source}, which is exported; name another folder")
    if not output.exists():
        return
    if not output.is_dir():
        raise ExportError(f"--output {output}: a file; name a folder")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise ExportError(
            f"--output {output}: not empty; replace it with --overwrite, or name another folder"
        )
    if not any((output / name).is_file() for name in _EXPORTS):
        raise ExportError(
            f"--output {output}: not empty, and no export that --overwrite may replace (none of "
            f"{', '.join(_EXPORTS)} is in it); name another folder"
        )


@contextmanager
def publishing(output: Path) -> Iterator[Path]:
    """Yield a new folder beside ``output``, which takes its place at the end and is gone after an error.

    Raises:
        ExportError: the disk is full, or the place is not writable.
    """
    output = output.absolute()
    unfinished, old = (output.with_name(f"{output.name}_{word}") for word in ("unfinished", "replaced"))
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
            output.rename(old)
        unfinished.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ExportError(f"--output {output}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
