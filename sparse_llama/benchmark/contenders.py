"""What is compared: PyTorch's dense kernels, this project's, and FlexAttention.

A backend does for the full causal layout what it does for any other: PyTorch's shortcut for it is not taken,
for that run shows what the backend's own code costs.
"""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_llama.attention.blockwise import BlockwiseCore, ChunkedLayout
from sparse_llama.attention.core import AttentionCore, attend
from sparse_llama.attention.documents import whole_rows
from sparse_llama.attention.prepared import prepare
from sparse_llama.benchmark.efficiency import PASSES, Pass, mean_utilisation
from sparse_llama.benchmark.timing import Contender
from sparse_llama.layouts import Layout

Backend = Literal["blockwise", "triton", "flex"]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
DENSE_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_MOST_GRAPHS = 256  # of FlexAttention in one process; Dynamo gives up after 8 masks otherwise


@dataclass(frozen=True, eq=False)
class Inputs:
    """Queries (1, H, T, D), keys and values (1, K, T, D), all with gradients, and the output's gradient."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad: torch.Tensor

    @property
    def scaling(self) -> float:
        return self.query.shape[-1] ** -0.5

    def leaves(self, *, has_backward: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query, key and value; without a backward pass, tensors that require no gradients."""
        inputs = (self.query, self.key, self.value)
        return inputs if has_backward else (inputs[0].detach(), inputs[1].detach(), inputs[2].detach())


@dataclass(frozen=True, eq=False)
class Prepared:
    """A backend on one layout."""

    attend: Attention
    has_backward: bool
    utilisation: dict[Pass, float]
    """Share of the computed token pairs that attend."""


def draw_inputs(
    *,
    num_heads: int,
    num_kv_heads: int,
    num_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Inputs:
    """Return normal random numbers: of zeros, a GPU multiplies more in a second."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, heads, num_tokens, head_dim, generator=generator, device=device, dtype=dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad)


def contender(name: str, attention: Attention, inputs: Inputs, *, has_backward: bool) -> Contender:
    """Return ``attention`` of ``inputs``; without a backward pass, nothing is kept for one."""
    leaves = inputs.leaves(has_backward=has_backward)
    backward = (lambda output: torch.autograd.grad(output, leaves, inputs.grad)) if has_backward else None
    return Contender(name, lambda: attention(*leaves), backward)


def dense_kernels(inputs: Inputs) -> dict[str, Attention]:
    """Return PyTorch's causal kernels that take ``inputs``, by name; on the CPU that is one."""
    num_tokens = min(128, inputs.query.shape[2])
    probe = [tensor.detach()[:, :, :num_tokens] for tensor in (inputs.query, inputs.key, inputs.value)]
    found: dict[str, Attention] = {}
    for name, kernel in DENSE_KERNELS.items():
        attention = _dense(kernel, is_grouped=inputs.query.shape[1] != inputs.key.shape[1])
        try:
            with warnings.catch_warnings(action="ignore"):  # it warns why, and then raises
                attention(probe[0], probe[1], probe[2])
        except RuntimeError:  # no such kernel for this device, type, or width
            continue
        found[name] = attention
    return found


def why_not(backend: Backend, device: torch.device) -> str | None:
    """Return why a backend cannot be measured on ``device``; None where it can."""
    is_cpu = device.type == "cpu"
    if backend == "blockwise":
        return None if is_cpu else "it is made for the CPU"
    if backend == "triton":
        if is_cpu:
            return "it needs a CUDA device"
        return "triton is not installed; pip install triton" if find_spec("triton") is None else None
    if is_cpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "compiled for a CPU it needs a C++ compiler; install g++"
    return None


def prepare_backend(backend: Backend, layout: Layout, inputs: Inputs) -> Prepared:
    """Return a backend on one layout, whole rows as documents."""
    match backend:
        case "blockwise":
            return _blockwise(layout, inputs)
        case "triton":
            return _triton(layout, inputs)
        case "flex":
            return _flex(layout, inputs)


def useful_pairs(layout: Layout, num_tokens: int) -> int:
    """Return how many pairs of tokens attend, in all heads."""
    pairs = num_tokens * (num_tokens + 1) // 2 * len(layout.head_patterns)
    return round(layout.density_at(num_tokens) * pairs)


def _dense(kernel: SDPBackend, *, is_grouped: bool) -> Attention:
    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped)

    return attention


class _AlwaysCut(ChunkedLayout):
    """Chunks of any layout, the full causal one too, which PyTorch's kernel would take in one call."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.is_causal_at = lru_cache(maxsize=1)(lambda num_tokens: False)


def _blockwise(layout: Layout, inputs: Inputs) -> Prepared:
    num_tokens = inputs.query.shape[2]
    chunked = _AlwaysCut(layout)
    computed = 0
    for pattern in layout.head_patterns:
        parts = chunked.parts(pattern, num_tokens)
        computed += sum((part.last - part.first) * part.num_keys for part in (*parts.leaves, *parts.shared))
    utilisation = useful_pairs(layout, num_tokens) / computed
    core = BlockwiseCore(chunked, whole_rows(1, num_tokens), inputs.scaling)
    return Prepared(_of_core(core), True, dict.fromkeys(PASSES, utilisation))


def _triton(layout: Layout, inputs: Inputs) -> Prepared:
    from sparse_llama.attention.triton_op import TritonCore

    num_tokens = inputs.query.shape[2]
    tiled, documents = prepare(layout).tiled, whole_rows(1, num_tokens)
    tiles = tiled.launches(documents, inputs.query, inputs.key.shape[1]).tiles
    forward, grad_query, grad_key = tiled.utilisation(num_tokens, tiles)
    # Products of tiles: q k and p v; q k, do v and ds k; q k, do v, p do and ds q.
    utilisation: dict[Pass, float] = {
        "forward": forward,
        "backward": mean_utilisation([(3, grad_query), (4, grad_key)]),
        "both": mean_utilisation([(2, forward), (3, grad_query), (4, grad_key)]),
    }
    return Prepared(_of_core(TritonCore(tiled, documents, inputs.scaling)), True, utilisation)


def _flex(layout: Layout, inputs: Inputs) -> Prepared:
    """FlexAttention itself, compiled: ``FlexCore``, made for the adapter, would run it twice in backward."""
    from torch._dynamo import config as dynamo_config
    from torch.nn.attention.flex_attention import flex_attention

    from sparse_llama.attention.flex import TILE, block_mask

    device, num_tokens, num_heads = inputs.query.device, inputs.query.shape[2], inputs.query.shape[1]
    mask = block_mask(layout, whole_rows(1, num_tokens), device)
    counts: Any = (mask.kv_num_blocks, mask.full_kv_num_blocks)
    num_tiles = sum(int(count.expand(1, num_heads, -1).sum()) for count in counts)
    if device.type == "cpu":
        mask = _full_width(mask)
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        is_grouped = query.shape[1] != key.shape[1]
        return compiled(query, key, value, block_mask=mask, scale=inputs.scaling, enable_gqa=is_grouped)

    has_backward = device.type == "cuda"
    with dynamo_config.patch(recompile_limit=_MOST_GRAPHS):
        attention(*inputs.leaves(has_backward=has_backward))
    utilisation = useful_pairs(layout, num_tokens) / (num_tiles * TILE**2)
    return Prepared(attention, has_backward, dict.fromkeys(PASSES, utilisation))


def _full_width(mask: Any) -> Any:
    """Return a BlockMask with lists as wide as there are tiles: the CPU kernel takes no narrower ones."""
    from torch.nn.attention.flex_attention import BlockMask

    def widen(indices: torch.Tensor) -> torch.Tensor:
        return F.pad(indices, (0, indices.shape[-2] - indices.shape[-1]))

    return BlockMask(
        mask.seq_lengths,
        mask.kv_num_blocks,
        widen(mask.kv_indices),
        mask.full_kv_num_blocks,
        widen(mask.full_kv_indices),
        mask.q_num_blocks,
        widen(mask.q_indices),
        mask.full_q_num_blocks,
        widen(mask.full_q_indices),
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask.mask_mod,
    )


def _of_core(core: AttentionCore) -> Attention:
    return lambda query, key, value: attend(core, query, key, value)
