"""Softmax attention under a bool table, and the table of a layout: the definitions, differentiated by
autograd."""

import itertools

import torch

from sparse_llama.layouts import Layout


def token_table(layout: Layout | None, num_heads: int, num_tokens: int) -> torch.Tensor:
    """Return the (H, T, T) table of one document: the layout's blocks and the token-causal triangle."""
    triangle = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    if layout is None:
        return triangle.expand(num_heads, -1, -1)
    blocks = torch.stack([layout.patterns[pattern].to_dense() for pattern in layout.head_patterns])
    tokens = blocks.repeat_interleave(layout.block, 1).repeat_interleave(layout.block, 2)
    return tokens[:, :num_tokens, :num_tokens] & triangle


def batch_table(layout: Layout | None, num_heads: int, position_ids: torch.Tensor) -> torch.Tensor:
    """Return the (B, H, T, T) table of packed rows; a document starts where its position is 0."""
    num_rows, num_tokens = position_ids.shape
    table = torch.zeros(num_rows, num_heads, num_tokens, num_tokens, dtype=torch.bool)
    for row in range(num_rows):
        starts = [t for t in range(num_tokens) if position_ids[row, t] == 0] + [num_tokens]
        for first, last in itertools.pairwise(starts):
            table[row, :, first:last, first:last] = token_table(layout, num_heads, last - first)
    return table


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return softmax(scaling q k^T) v over the true cells of ``table``, in the inputs' dtype."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (scaling * (query @ key.transpose(-1, -2))).masked_fill(~table, -torch.inf)
    return scores.softmax(-1) @ value


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative L2 distance, measured in fp64."""
    return float(
        (actual.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm()
    )
