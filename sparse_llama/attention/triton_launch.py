"""Calls of the Triton kernels: from tensors and a ``tiles.Launch`` to a kernel's arguments and constants."""

from collections.abc import Sequence
from typing import Any

import torch
import triton

from sparse_llama.attention import triton_kernels
from sparse_llama.attention.tiles import KeySizes, RowSizes

kernels: Any = triton_kernels  # a jitted function is called with its grid and options besides its parameters
Saved = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key, value, gradient of the output, lse and delta."""
# Triton 3.10 no longer fuses a * b + c unless told to; p = exp2(s * scale - peak) is one.
_FUSED = {"enable_fp_fusion": True}


def run_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
    rows: Sequence[torch.Tensor],
    sizes: RowSizes,
) -> None:
    """Write output and lse of the documents' tokens."""
    items, *lists, head_patterns = rows
    kernels.forward[(len(items), query.shape[1])](
        query,
        key,
        value,
        output,
        lse,
        items,
        tuple(lists[:2]),
        tuple(lists[2:]),
        head_patterns,
        *_strides(query, key, value, output),
        scaling,
        sizes.num_tiles,
        query.shape[2],
        query.shape[1] // key.shape[1],
        **_row_constants(query, sizes),
    )


def run_grad_query(
    saved: Saved, result: torch.Tensor, scaling: float, rows: Sequence[torch.Tensor], sizes: RowSizes
) -> None:
    """Write the query gradient of the documents' tokens."""
    query, key, value, grad, _, _ = saved
    items, *lists, head_patterns = rows
    kernels.grad_query[(len(items), query.shape[1])](
        *saved,
        result,
        items,
        tuple(lists[:2]),
        tuple(lists[2:]),
        head_patterns,
        *_strides(query, key, value, grad, result),
        scaling,
        sizes.num_tiles,
        query.shape[2],
        query.shape[1] // key.shape[1],
        **_row_constants(query, sizes),
    )


def run_grad_key_value(
    saved: Saved,
    result_key: torch.Tensor,
    result_value: torch.Tensor,
    scaling: float,
    keys: Sequence[torch.Tensor],
    sizes: KeySizes,
) -> None:
    """Write the key and value gradients of the documents' tokens; both results have the same strides.

    Results have a head for every ``sizes.num_heads_each`` query heads.
    """
    query, key, value, grad, _, _ = saved
    items, item_starts, sums, sum_starts, key_units, *lists, head_patterns = keys
    num_heads, constants = query.shape[1] // sizes.num_heads_each, _widths(query)
    slots = (num_heads, sizes.max_slots, sizes.keys, constants["PADDED"])
    partials = torch.empty((2, *slots), dtype=torch.float32, device=query.device)
    results = (result_key, result_value, partials[0], partials[1])
    kernels.grad_key_value[(sizes.max_items, num_heads)](
        *saved,
        *results,
        items,
        item_starts,
        key_units,
        tuple(lists[:2]),
        tuple(lists[2:]),
        head_patterns,
        *_strides(query, key, value, grad, result_key),
        scaling,
        query.shape[2],
        sizes.max_slots,
        query.shape[1] // key.shape[1],
        sizes.num_heads_each,
        **constants,
        QUERIES=sizes.queries,
        KEYS=sizes.keys,
        KEY_UNIT=sizes.key_unit,
        QUERY_UNIT=sizes.query_unit,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        **_FUSED,
    )
    if sizes.max_sums == 0:
        return
    parts = sizes.keys // triton_kernels.SLOT_ROWS
    kernels.add_partials[(sizes.max_sums * parts, num_heads)](
        *results,
        sums,
        sum_starts,
        key_units,
        head_patterns,
        *_strides(result_key),
        scaling,
        sizes.max_slots,
        sizes.num_heads_each,
        **constants,
        KEYS=sizes.keys,
        KEY_UNIT=sizes.key_unit,
        ROWS=triton_kernels.SLOT_ROWS,
        **_FUSED,
    )


def _strides(*tensors: torch.Tensor) -> list[tuple[int, ...]]:
    return [tensor.stride()[:3] for tensor in tensors]


def _widths(query: torch.Tensor) -> dict[str, int]:
    width = query.shape[3]
    return {"WIDTH": width, "PADDED": max(16, triton.next_power_of_2(width))}


def _row_constants(query: torch.Tensor, sizes: RowSizes) -> dict[str, int]:
    return {
        **_widths(query),
        "QUERIES": sizes.queries,
        "KEYS": sizes.keys,
        "KEY_UNIT": sizes.key_unit,
        "ROW_UNIT": sizes.row_unit,
        "num_warps": sizes.num_warps,
        "num_stages": sizes.num_stages,
        **_FUSED,
    }
