"""Whether all ranks are about to do the same: asked before they depend on it, as ranks that differ hang, or
train something that is nobody's configuration, without a word."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparse_llama.distributed import ranks
from sparse_llama.errors import ConfigError

_DIGEST_BYTES = 6  # of a SHA-256: exact in fp64


def check_agreement(read: Callable[[], Mapping[str, Any]]) -> None:
    """Compare what ``read`` returns with the main rank's, all ranks at once; it is not called where there is
    one. Parts by name, each as ``json`` holds it.

    Raises:
        ConfigError: on every rank, naming the first part that a rank has another of.
    """
    if ranks.world_size() == 1:
        return
    for name, part in read().items():
        digests = ranks.gather_numbers(_digest(part))
        others = [number for number, digest in enumerate(digests) if digest != digests[0]]
        if others:
            listed = ", ".join(map(str, others))
            raise ConfigError(
                f"{name}: rank{'s' if len(others) > 1 else ''} {listed} and rank 0 differ; start all with "
                "the same file, flags, code, packages and data"
            )


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of names, shapes and contents."""
    hashed = hashlib.sha256()
    for name, tensor in tensors.items():
        hashed.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def _digest(part: Any) -> int:
    text = json.dumps(part, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES], "big")
