"""What a run's parts hold on one device at this moment, by component, from the tensors themselves."""

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from sparse_llama.distributed.dataless import holds_data
from sparse_llama.training.masters import optimizer_tensors

WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER = "weights", "adapters", "gradients", "optimizer"
LIBRARIES = "libraries"
"""What a process holds before it has a model."""


def held_bytes(model: nn.Module, engine: Any, device_type: str) -> dict[str, int]:
    """Return the bytes of ``model`` and its optimizer on ``cpu`` or ``cuda``; memory that two share counts
    once, for the first.

    Args:
        engine: DeepSpeed's; None before there is one.
    """
    frozen = [one for one in model.parameters() if not one.requires_grad]
    trained = [one for one in model.parameters() if one.requires_grad]
    parts: dict[str, Iterable[torch.Tensor]] = {
        WEIGHTS: _tensors_of(frozen),
        ADAPTERS: _tensors_of(trained),
        GRADIENTS: [one.grad for one in model.parameters() if one.grad is not None],
        OPTIMIZER: () if engine is None else optimizer_tensors(engine),
    }
    seen: set[int] = set()
    return {name: _count(tensors, device_type, seen) for name, tensors in parts.items()}


def live_bytes() -> int:
    """Return the bytes of all tensors in host memory that Python knows, those of libraries included: between
    steps, when no graph is alive, all that there are."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    tensors = [one for one in tensors if holds_data(one)]  # a plan in this process may have left some
    tensors += [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    return _count(tensors, "cpu", set())


def _tensors_of(parameters: list[nn.Parameter]) -> Iterator[torch.Tensor]:
    for parameter in parameters:
        yield parameter
        partition = getattr(parameter, "ds_tensor", None)  # ZeRO-3: this rank's part, wherever it waits
        if torch.is_tensor(partition):
            yield partition


def _count(tensors: Iterable[torch.Tensor], device_type: str, seen: set[int]) -> int:
    """Return the bytes of the storages behind ``tensors`` that are not ``seen`` yet."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # A storage of 0 bytes has no address of its own
        if tensor.device.type == device_type and storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
