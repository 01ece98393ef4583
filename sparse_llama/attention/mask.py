"""Which token sees which, as dense bool tables: the layout, causality and documents in one place.

Quadratic in the tokens: for the reference, and for the few rows that a benchmark checks.
"""

import torch

from sparse_llama.attention.documents import Documents
from sparse_llama.layouts import Layout


def rows_mask(layout: Layout | None, num_heads: int, first: int, last: int) -> torch.Tensor:
    """Return (H, last - first, last) bool: what tokens [first, last) of a document see of it so far."""
    queries, keys = torch.arange(first, last), torch.arange(last)
    causal = queries[:, None] >= keys  # (T, S)
    if layout is None:
        return causal.expand(num_heads, -1, -1)
    blocks = queries // layout.block
    first_block, num_blocks = first // layout.block, layout.blocks_of(last)
    tables = torch.stack([p.first_rows(num_blocks).to_dense(first_block) for p in layout.patterns])
    seen = tables[:, blocks - first_block][:, :, keys // layout.block]  # (patterns, T, S)
    return (seen & causal)[list(layout.head_patterns)]


def documents_mask(layout: Layout | None, num_heads: int, documents: Documents) -> torch.Tensor:
    """Return the (B, H, T, T) bool table of a batch of packed documents."""
    size = documents.num_tokens
    mask = torch.zeros(documents.num_rows, num_heads, size, size, dtype=torch.bool)
    for group in documents.groups:
        inner = rows_mask(layout, num_heads, 0, group.num_tokens)
        for row in group.rows:
            mask[row, :, group.first : group.last, group.first : group.last] = inner
    return mask
