"""Another program's adapter as an adapter folder of this project."""

from dataclasses import dataclass
from pathlib import Path

from sparse_llama.adapters.weights import AdapterFile, is_native, write_adapter_folder
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import CheckpointError
from sparse_llama.export.publish import check_output, publishing
from sparse_llama.export.source import find_source, locate


@dataclass(frozen=True)
class Imported:
    """What was read and written."""

    folder: Path
    format: str
    file: AdapterFile
    notices: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Return what a user has to know: what it is here, and of which base."""
        return [
            ("folder", str(self.folder)),
            ("read as", self.format),
            ("variant", describe_variant(self.file.adapter)),
            ("parameters", f"{self.file.trainable_parameters:,}"),
            ("base", self.file.base_model.path),
            *(("note", notice) for notice in self.notices),
        ]


def import_adapter(adapter: Path, output: Path, *, model: str | None, overwrite: bool = False) -> Imported:
    """Write the adapter of another program as a folder that every ``--adapter`` takes without ``--model``.

    Args:
        model: hub id or folder of its base; None is the one that it names.

    Raises:
        CheckpointError: there is no adapter, it is this project's own, damaged, or does not fit the base.
        ModelError: the base is missing.
        ExportError: the output holds something else.
    """
    if is_native(locate(adapter, flag="--adapter")):
        raise CheckpointError(
            f"--adapter {adapter}: an adapter folder of this project already; use it as it is"
        )
    source = find_source(adapter, model, flag="--adapter")
    check_output(output, overwrite=overwrite, sources=(source.adapter, source.base))
    with publishing(output) as unfinished:
        write_adapter_folder(unfinished, source.tensors, source.file)
    return Imported(output, source.format, source.file, source.notices)


def describe_variant(settings: AdapterSettings) -> str:
    """Return the settings that are not the defaults, as the ``sparse_llama.adapter`` block has them."""
    chosen = {"version": settings.version, "prompt_length": settings.prompt_length}
    chosen |= settings.model_dump(exclude_defaults=True)
    return ", ".join(f"{name} {_show(value)}" for name, value in chosen.items())


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return " + ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
