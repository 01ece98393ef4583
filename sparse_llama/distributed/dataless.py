"""Tensors that have sizes and no content: a plan runs a step on them."""

import torch
from torch._subclasses.fake_tensor import FakeTensor


def holds_data(tensor: torch.Tensor) -> bool:
    """Return whether there are bytes to move: none behind a fake tensor, nor on the device ``meta``."""
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta
