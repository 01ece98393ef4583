"""Which core computes what.

    full causal                  PyTorch's own kernels: the numbers of plain LLaMA
    block-sparse on the CPU      ``blockwise``
    block-sparse on CUDA         ``triton``; ``flex`` where its tiles cannot hold the blocks
    on ``meta``                  what CUDA would get, as allocations without data: a planner's accelerator

A slower core in place of the one that was meant is said once. None changes the numbers: all are exact.
"""

import importlib.util
import logging
import os
from functools import lru_cache
from typing import Literal

import torch

from sparse_llama.attention.blockwise import BlockwiseCore
from sparse_llama.attention.core import AttentionCore
from sparse_llama.attention.documents import Documents
from sparse_llama.attention.kernels import has_flash
from sparse_llama.attention.prepared import prepare
from sparse_llama.attention.reference import ReferenceCore
from sparse_llama.attention.workspace import AllocationCore
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import Layout

Backend = Literal["auto", "reference", "blockwise", "triton", "flex"]
logger = logging.getLogger(__name__)
_KEY = "sparse_llama.attention.backend"


def make_core(
    layout: Layout | None,
    documents: Documents,
    query: torch.Tensor,
    *,
    scaling: float,
    backend: Backend = "auto",
) -> AttentionCore:
    """Return the core of one batch.

    Args:
        layout: None is full causal attention; one that is causal for the longest document is taken as such.
        query: (B, H, T, D), for its device, dtype and head width.

    Raises:
        ConfigError: ``backend`` does not run on this device.
    """
    # A document shorter than the longest may still be causal under the layout: the cores know.
    if layout is not None and prepare(layout).is_causal_at(documents.longest):
        layout = None
    if backend == "reference":
        return ReferenceCore(layout, documents, scaling)
    device = query.device
    if layout is None:
        if device.type == "meta" and not has_flash(query):
            return AllocationCore("efficient", None, documents)
        return BlockwiseCore(None, documents, scaling)
    chosen = choose_backend(layout, device, query.dtype, query.shape[-1], backend)
    if device.type == "meta" and (chosen == "triton" or chosen == "flex"):
        return AllocationCore(chosen, layout, documents)
    match chosen:
        case "blockwise":
            return BlockwiseCore(prepare(layout).chunked, documents, scaling)
        case "triton":
            from sparse_llama.attention.triton_op import TritonCore

            return TritonCore(prepare(layout).tiled, documents, scaling)
        case "flex":
            from sparse_llama.attention.flex import FlexCore

            return FlexCore(prepare(layout).flex_mask(documents, device), scaling)
        case _:
            return ReferenceCore(layout, documents, scaling)


def choose_backend(
    layout: Layout, device: torch.device, dtype: torch.dtype, head_dim: int, backend: Backend
) -> Backend:
    """Return the backend of a sparse layout that ``backend`` comes to on a device.

    Raises:
        ConfigError: it does not run there.
    """
    if device.type == "cpu":
        if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(f"{_KEY}: triton needs a CUDA device; use auto, blockwise or reference")
        if backend == "flex":
            raise ConfigError(
                f"{_KEY}: flex has no backward pass on the CPU; use auto, blockwise or reference"
            )
        return "blockwise" if backend == "auto" else backend
    if backend == "blockwise":
        raise ConfigError(f"{_KEY}: blockwise is made for the CPU; use auto, triton, flex or reference")
    if backend == "auto":
        reason = _why_not_triton(layout, dtype, head_dim, is_planned=device.type == "meta")
        if reason is None:
            return "triton"
        slower: Backend = "reference" if dtype == torch.float64 else "flex"
        if device.type == "meta":
            return slower
        _say_once(f"{_KEY}: {slower} computes what triton would, slower: {reason}")
        return slower
    return backend


def _why_not_triton(layout: Layout, dtype: torch.dtype, head_dim: int, *, is_planned: bool) -> str | None:
    if not is_planned and importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "its kernels have no fp64"
    if head_dim > 256:
        return f"heads of {head_dim} are wider than its 256"
    from sparse_llama.attention.tiles import supports

    if not supports(layout):
        return f"a block of {layout.block} tokens does not tile; use a multiple of 16"
    return None


@lru_cache(maxsize=16)
def _say_once(message: str) -> None:
    logger.warning(message)
