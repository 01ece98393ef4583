"""What PyTorch's CPU operations allocate and release inside: copies of operands of another type.

An operation that computes in the wider of two types casts the narrower operand whole before it begins, and an
output narrower than that is written wide first (``TensorIterator``, ``cast_common_dtype_to_outputs`` and
``promote_inputs_to_common_dtype``). CUDA casts number by number.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

aten: Any = torch.ops.aten


def promotion_bytes(*args: Any, **kwargs: Any) -> int:
    """Return the bytes of the operands' copies, and of a wide output of an operation in place."""
    return _cast_bytes([value for value in args if isinstance(value, torch.Tensor)])


def promotion_bytes_in_place(*args: Any, **kwargs: Any) -> int:
    operands = [value for value in args if isinstance(value, torch.Tensor)]
    return _cast_bytes([*operands, operands[0]])


def sum_bytes(tensor: torch.Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> int:
    """Return the bytes of the copy that a sum in another type is made of."""
    return 0 if dtype is None or dtype == tensor.dtype else tensor.numel() * dtype.itemsize


def _cast_bytes(operands: list[torch.Tensor]) -> int:
    if len({one.dtype for one in operands}) == 1:
        return 0
    common = operands[0].dtype
    for one in operands:
        common = torch.promote_types(common, one.dtype) if one.dim() else common
    return sum(one.numel() * common.itemsize for one in operands if one.dtype != common and one.dim())


CPU_TEMPORARIES: Mapping[Any, Callable[..., int]] = {
    **{
        op: promotion_bytes
        for op in (
            *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor),
            *(aten.addcmul.default, aten.maximum.default, aten.pow.Tensor_Tensor),
        )
    },
    **{
        op: promotion_bytes_in_place
        for op in (
            *(aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor),
            aten.addcmul_.default,
        )
    },
    aten.sum.dim_IntList: sum_bytes,
}
"""Bytes that an operation on CPU tensors takes and gives back, as a function of its arguments."""
