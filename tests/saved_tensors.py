"""What autograd keeps for a backward pass."""

from collections.abc import Callable

import torch
from torch import nn


def kept_for_backward(run: Callable[[], object], module: nn.Module) -> list[torch.Tensor]:
    """Return what ``run`` saves, each storage once, without the parameters and buffers of ``module``."""
    found: dict[int, torch.Tensor] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # kept alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return [tensor for address, tensor in found.items() if address not in own]


def num_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
