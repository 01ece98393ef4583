"""Which tensors exist, by the storages that operators make: a count that asks nobody's bookkeeping."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts storages of ``num_bytes`` on ``device`` that operators under it made and nobody has freed."""

    def __init__(self, num_bytes: int, device: str = "cpu") -> None:
        super().__init__()
        self.peak = 0
        self._num_bytes, self._device = num_bytes, device
        self._alive: dict[int, weakref.ref[Any]] = {}

    @property
    def count(self) -> int:
        return len(self._alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self._device:
                self._see(leaf.untyped_storage())
        self.peak = max(self.peak, self.count)
        return output

    def _see(self, storage: Any) -> None:
        if storage.nbytes() == self._num_bytes and storage._cdata not in self._alive:
            key = storage._cdata
            self._alive[key] = weakref.ref(storage, lambda _: self._alive.pop(key))
