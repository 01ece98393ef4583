"""Where a base model's files are, and its tensors one shard at a time.

Two formats: ``safetensors``, and ``.bin`` shards read with ``weights_only=True``. Both are memory-mapped, so
a tensor costs host memory only while it is copied.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sparse_llama.adapters.interop.files import load_plain
from sparse_llama.config.bundled import resolve_bundled
from sparse_llama.config.paths import expand, is_file, is_folder, without_secrets
from sparse_llama.config.section import quote, show_plain
from sparse_llama.config.tables import read_table
from sparse_llama.errors import CheckpointError, ModelError

_SAFETENSORS, _BIN = "safetensors", "bin"
_SMALL_FILES = ["*.json", "*.model", "*.py", "*.txt", "*.jinja"]
# Meta's own shards and other frameworks' copies of the same weights
_NOT_OURS = [
    "original/*",
    "consolidated*",
    "*.gguf",
    "*.onnx",
    "onnx/*",
    "*.msgpack",
    "*.h5",
    "training_args.bin",
]


def resolve_model(model: str, revision: str | None = None) -> Path:
    """Return the local folder of ``bundled:NAME``, of a folder, or of a hub id, which is downloaded if it is
    not cached.

    Raises:
        ModelError: there is no such folder, or the hub cannot be reached or has no such model.
    """
    if model.startswith("bundled:"):
        bundled = resolve_bundled(model)
        if bundled is None or not bundled.is_dir():
            raise ModelError(
                f"sparse_llama.model.path: no bundled model {model!r}; there is bundled:tiny-llama"
            )
        return bundled
    folder = expand(model)
    if is_folder(folder):
        return folder
    if not _is_hub_id(model):
        raise ModelError(
            f"{without_secrets(model)}: no such folder; give a local folder, a hub id (owner/name) or "
            "bundled:tiny-llama"
        )
    return _download(model, revision)


def resolve_tokenizer(model: str, revision: str | None = None) -> Path:
    """Return a folder with the model's tokenizer and configuration; of a hub id no weights are downloaded.

    Raises:
        ModelError: as ``resolve_model``.
    """
    if not _is_hub_id(model):
        return resolve_model(model, revision)
    return _download(model, revision, has_weights=False)


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the memory-mapped tensor of everything in ``folder``'s checkpoint, one shard after
    the other.

    The order is the same on every rank: shards by name, tensors in the order of their file.

    Raises:
        ModelError: no checkpoint, a shard that the index names is missing, or a file is damaged.
    """
    kind, shards = _shards(folder)
    for shard in shards:
        yield from _read_safetensors(shard) if kind == _SAFETENSORS else _read_bin(shard)


def _is_hub_id(model: str) -> bool:
    if model.startswith((".", "bundled:")) or is_folder(expand(model)):
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) is not None


def _download(model: str, revision: str | None, *, has_weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download  # 0.3 s to import, and most runs never need it

    def fetch(*pattern: str) -> Path:
        # tensors of one format only: many models are on the hub in both, 13 GB each
        patterns = [*_SMALL_FILES, *pattern]
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_OURS)
        )

    try:
        if not has_weights:
            return fetch()
        folder = fetch("*.safetensors")
        return folder if any(folder.glob("*.safetensors")) else fetch("*.bin")
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors or ValueErrors
        reason = str(error).strip().split("\n", 1)[0]
        raise ModelError(
            f"{model}: not a local folder, and not available from the hub ({type(error).__name__}: "
            f"{reason}); "
            "check the name and the network, or give a local folder"
        ) from error


def _shards(folder: Path) -> tuple[str, list[Path]]:
    for kind, stem in ((_SAFETENSORS, "model"), (_BIN, "pytorch_model")):
        index, whole = folder / f"{stem}.{kind}.index.json", folder / f"{stem}.{kind}"
        if whole.is_file():
            return kind, [whole]
        if index.is_file():
            return kind, _indexed(folder, index)
    raise ModelError(
        f"{folder}: no weights; expected model.safetensors, pytorch_model.bin, or shards with their "
        ".index.json"
    )


def _indexed(folder: Path, index: Path) -> list[Path]:
    """Return the shards that ``index`` names, all of them beside it: no file elsewhere is read because a
    download says so."""
    table = read_table(index, ModelError, remedy="download it again").get("weight_map")
    files = list(table.values()) if isinstance(table, dict) else []
    if not files or not all(isinstance(name, str) for name in files):
        raise ModelError(f"{index}: not an index of shards (no weight_map); download it again")
    names = sorted(set(files))
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index}: names a shard {quote(name)} that is not beside it; download it again")
    missing = [name for name in names if not is_file(folder / name)]
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing (first {show_plain(missing[0])}); "
            "finish the download"
        )
    return [folder / name for name in names]


def _read_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        reason = show_plain(str(error))
        raise ModelError(f"{path}: not a complete safetensors file ({reason}); download it again") from error


def _read_bin(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        tensors = load_plain(path)
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()
    ):
        raise ModelError(
            f"{path}: holds a {type(tensors).__name__} that is not a table of tensors; expected a state dict"
        )
    yield from tensors.items()
