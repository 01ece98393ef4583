"""How large a sparse kernel's tables and partial sums are, found from a part of a long layout.

A layout of 524,288 tokens in blocks of 16 takes minutes to tile, which a plan has no time for. Tables grow
with the active blocks, so beyond ``_LARGEST`` blocks they are those of the crop, scaled.
"""

from dataclasses import dataclass

import torch

from sparse_llama.attention.documents import Documents, whole_rows
from sparse_llama.attention.prepared import prepare
from sparse_llama.attention.tiles import KeySizes, Launches, choose_tiles
from sparse_llama.layouts import Layout

_LARGEST = 1024  # blocks; exact up to there, in under a second
_A100 = (8, 0)


@dataclass(frozen=True)
class KernelSizes:
    """Of the Triton kernels for one layout and batch."""

    table_bytes: int
    """On the device for as long as the layout is used."""
    max_slots: int
    """Partial sums of the key gradient."""
    num_heads_each: int
    """Query heads that share a key gradient."""
    keys: int
    """Tokens of a slot."""


def kernel_sizes(
    layout: Layout, documents: Documents, head_dim: int, dtype: torch.dtype, num_kv_heads: int
) -> KernelSizes:
    """Return the sizes for a batch; the last is kept with the layout."""
    key = "kernel sizes", documents, head_dim, dtype, num_kv_heads
    known = layout.derived.get("kernel sizes")
    if known is None or known[0] != key:
        known = key, _measure(layout, documents, head_dim, dtype, num_kv_heads)
        layout.derived["kernel sizes"] = known
    return known[1]


def _measure(
    layout: Layout, documents: Documents, head_dim: int, dtype: torch.dtype, num_kv_heads: int
) -> KernelSizes:
    longest = documents.longest
    tokens = min(longest, _LARGEST * layout.block)
    batch, times = documents, 1.0
    if tokens < longest:
        batch = whole_rows(documents.num_rows, tokens)
        times = layout.density_at(longest) / layout.density_at(tokens) * (longest / tokens) ** 2
    tiles = choose_tiles(layout.block, head_dim, dtype, _A100)
    launches = Launches(prepare(layout).tiled, batch, tiles, torch.device("cpu"), num_kv_heads)
    made = {id(one[0]): one[0] for one in (launches.forward, launches.grad_query, launches.grad_key)}
    table_bytes = sum(tensor.nbytes for tensors in made.values() for tensor in tensors)
    sizes = KeySizes(*launches.grad_key[1])
    budget = documents.num_rows * documents.num_tokens // (8 * sizes.keys)  # work.key_work's
    slots = sizes.max_slots
    if tokens < longest:
        slots = min(budget, -(-slots * longest // tokens))
    return KernelSizes(int(table_bytes * times), slots, sizes.num_heads_each, sizes.keys)
