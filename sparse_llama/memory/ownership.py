"""Whether a backward pass may write into the gradient that it is given.

The engine hands a node the gradient of its output, and often nobody else will read it: then it is memory to
reuse, one token-by-width tensor of a layer's backward pass. It is not where the graph has passed one tensor
to two nodes (a sum does), where ``torch.autograd.grad`` or a hook keeps it, or where it is a view. PyTorch
decides the same for its own accumulation by counting references (``torch/csrc/autograd/input_buffer.cpp``,
``can_accumulate_inplace``); so do we, against what a gradient that nobody else has is seen to have.
"""

import sys
from typing import Any

import torch
from torch.autograd.function import once_differentiable

References = tuple[int, int, int]
"""To the C++ tensor, to its memory, and to the Python object."""


def count_references(grad: torch.Tensor) -> References:
    """Return who holds ``grad``; to be called from the first line of a ``backward``, on its argument."""
    tensor: Any = grad
    storage = tensor.untyped_storage()
    return tensor._use_count(), torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(grad)


def references_when_alone() -> References:
    """Return the counts of a gradient that nobody but the running ``backward`` holds, on this version of
    Python and PyTorch."""
    with torch.enable_grad(), torch.inference_mode(False):
        found: list[References] = []
        leaf = torch.zeros(1, requires_grad=True)
        # the product makes a gradient of its own, as a layer above does
        torch.autograd.backward(_Probe.apply(leaf, found) * 2, torch.ones(1), inputs=leaf)
    return found[0]


def is_alone(references: References, alone: References, grad: torch.Tensor) -> bool:
    """Return whether nobody else can see a write into ``grad``."""
    counts = zip(references, alone, strict=True)
    return grad.is_contiguous() and all(found <= expected for found, expected in counts)


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, found: list[References]) -> torch.Tensor:
        ctx.found = found
        return tensor.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        ctx.found.append(count_references(grad))
        return grad.clone(), None
