"""Safetensors shards written in place: every tensor goes to its file and offset as it arrives, in any order.

The names and shapes of an export are known before its first tensor is. So the headers are written first, and
no more than one tensor is in memory, however the input is cut into shards. The bytes depend on names, shapes
and values only.

Format: https://github.com/huggingface/safetensors#format - eight bytes with the length of the header, the
header (JSON: type, shape and offsets of every tensor), the data without gaps.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
MAX_SHARD_BYTES = 4 * 10**9


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be, before there is one."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """The ``model.safetensors`` of a folder, or its shards and their index; a context manager."""

    def __init__(
        self, folder: Path, specs: dict[str, TensorSpec], *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._specs = specs
        self._missing = set(specs)
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        shards = _cut(specs, max_shard_bytes)
        names = [
            "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            for i in range(1, len(shards) + 1)
        ]
        for file_name, shard in zip(names, shards, strict=True):
            self._open(folder / file_name, shard)
        if len(shards) > 1:
            weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            total = sum(spec.num_bytes for spec in specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write ``tensor``, cast to what its specification says."""
        spec = self._specs[name]
        assert tuple(tensor.shape) == spec.shape, f"{name}: {tuple(tensor.shape)}, expected {spec.shape}"
        self._missing.remove(name)  # KeyError: written twice
        file, offset = self._places[name]
        data = tensor.detach().to("cpu", spec.dtype).contiguous().flatten()
        file.seek(offset)
        file.write(data.view(torch.uint8).numpy().data)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        for file in self._files:
            file.close()
        if error_type is None:
            assert not self._missing, f"never written: {sorted(self._missing)}"

    def _open(self, path: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            spec = self._specs[name]
            end = offset + spec.num_bytes
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes
        file = path.open("wb")
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + offset)
        offset = start
        for name in names:
            self._places[name] = (file, offset)
            offset += self._specs[name].num_bytes


def _cut(specs: dict[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    """Return the names of each shard: in order of name; in a shard wide types first, so that all are
    aligned."""
    shards: list[list[str]] = [[]]
    used = 0
    for name in sorted(specs):
        size = specs[name].num_bytes
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return [sorted(shard, key=lambda name: (-specs[name].dtype.itemsize, name)) for shard in shards]
