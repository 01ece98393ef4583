"""Block-sparse attention on CUDA through PyTorch's FlexAttention.

FlexAttention wants two descriptions of the mask: which tiles of 128 x 128 tokens to visit (``BlockMask``),
and a function that says which tokens inside a tile see each other (``mask_mod``). Both are made from the
layout's intervals in memory proportional to them: ``create_block_mask`` would visit all T x T pairs (276 GB
at 512K).

The token function cannot look a block pair up in an N x N table, so intervals are split in two: columns that
every later row sees (global blocks) are one bit per column, and what remains (windows, global rows, random
blocks) is a few intervals per row in every mode.

``B`` batch, ``T`` tokens, ``H`` query heads, ``N`` layout blocks, ``M`` tiles on a side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from sparse_llama.attention.core import Gradients
from sparse_llama.attention.documents import Documents
from sparse_llama.layouts import Layout
from sparse_llama.layouts.intervals import Intervals

TILE = 128  # H100's backward configurations need mask blocks that are multiples of 128
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FlexCore:
    """FlexAttention over one batch's documents.

    The backward pass runs the forward pass again: FlexAttention's own gradient needs the output of the core
    alone, while the adapter keeps the sum with its prompt attention.
    """

    mask: BlockMask
    scaling: float
    is_compiled: bool = True
    """False computes the same eagerly, in T x T memory; for tests without a GPU."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, aux = self._attend(query, key, value)
        return output, aux.lse

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
    ) -> Gradients:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            again, _ = self._attend(inputs[0], inputs[1], inputs[2])
        grad_query, grad_key, grad_value = torch.autograd.grad(again, inputs, grad)
        return grad_query, grad_key, grad_value

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        attend = _compiled() if self.is_compiled else flex_attention
        return attend(
            query,
            key,
            value,
            block_mask=self.mask,
            scale=self.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True),
        )


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


def block_mask(layout: Layout, documents: Documents, device: torch.device) -> BlockMask:
    """Return the mask of a batch: tiles to visit, and the token function for those that are not full."""
    size = documents.num_tokens
    num_tiles = -(-size // TILE)
    made = [
        [_tiles(layout, pattern, documents, row) for pattern in layout.patterns]
        for row in range(documents.num_rows)
    ]
    # A mask of one head serves all: that is all there is to say where the heads have one pattern.
    heads = (0,) if len(layout.patterns) == 1 else layout.head_patterns
    tiles = [[patterns[own] for own in heads] for patterns in made]

    def lists(is_full: bool, is_transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = [[tile.select(is_full, is_transposed) for tile in row] for row in tiles]
        counts, indices = _pad(chosen, num_tiles)
        return counts.to(device), indices.to(device)

    return BlockMask(
        (size, size),
        *lists(is_full=False, is_transposed=False),
        *lists(is_full=True, is_transposed=False),
        *lists(is_full=False, is_transposed=True),
        *lists(is_full=True, is_transposed=True),
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=mask_mod(layout, documents, device),
    )


@dataclass(frozen=True)
class _Tiles:
    """The active tiles of one batch row and pattern, in order of query and then key."""

    query: torch.Tensor
    key: torch.Tensor
    is_full: torch.Tensor

    def select(self, is_full: bool, is_transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return line and entry of every full or partial tile; key lines of query entries if transposed."""
        chosen = self.is_full if is_full else ~self.is_full
        query, key = self.query[chosen], self.key[chosen]
        if not is_transposed:
            return query, key
        order = torch.argsort(key, stable=True)
        return key[order], query[order]


def _tiles(layout: Layout, pattern: Intervals, documents: Documents, row: int) -> _Tiles:
    """Count the token pairs of every tile, ``slice_size`` query rows at a time: each is in one tile row."""
    slice_size = math.gcd(layout.block, TILE, *(group.first for group in documents.groups))
    per_block = layout.block // slice_size
    num_tiles = -(-documents.num_tokens // TILE)
    keys: list[torch.Tensor] = []
    pairs: list[torch.Tensor] = []
    for group in documents.groups:
        if row not in group.rows:
            continue
        crop = pattern.first_rows(layout.blocks_of(group.num_tokens))
        slices = crop.rows[:, None] * per_block + torch.arange(per_block)  # (R, slices)
        first = (group.first + slices * slice_size).flatten()
        heights = (group.last - first).clamp(max=slice_size)
        starts = (group.first + crop.starts * layout.block).repeat_interleave(per_block)
        ends = (group.first + crop.ends * layout.block).repeat_interleave(per_block)
        ends = ends.minimum(first + heights)  # causal, and the end of the document
        is_real = (heights > 0) & (starts < ends)
        first, heights, starts, ends = (t[is_real] for t in (first, heights, starts, ends))
        widths = (ends - 1) // TILE - starts // TILE + 1  # in tiles
        owner = torch.repeat_interleave(torch.arange(widths.numel()), widths)
        within = torch.arange(owner.numel()) - torch.repeat_interleave(widths.cumsum(0) - widths, widths)
        tile = starts[owner] // TILE + within
        overlap = ends[owner].minimum((tile + 1) * TILE) - starts[owner].maximum(tile * TILE)
        keys.append(first[owner] // TILE * num_tiles + tile)
        pairs.append(heights[owner] * overlap)
    found, index = torch.unique(torch.cat(keys), return_inverse=True)
    count = torch.zeros_like(found).index_add_(0, index, torch.cat(pairs))
    query, key = found // num_tiles, found % num_tiles
    # The count takes whole slices on the diagonal: tiles there are partial whatever it says.
    return _Tiles(query, key, (count == TILE * TILE) & (key < query))


def _pad(
    chosen: list[list[tuple[torch.Tensor, torch.Tensor]]], num_tiles: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, H, M) counts and (B, H, M, W) int32 entries; W is the longest line, at least 1."""
    counts = torch.stack(
        [torch.stack([line.bincount(minlength=num_tiles) for line, _ in row]) for row in chosen]
    )
    indices = torch.zeros(*counts.shape, max(1, int(counts.max())), dtype=torch.int32)
    for b, row in enumerate(chosen):
        for h, (line, entry) in enumerate(row):
            firsts = counts[b, h].cumsum(0) - counts[b, h]
            indices[b, h, line, torch.arange(line.numel()) - firsts[line]] = entry.to(torch.int32)
    return counts.to(torch.int32), indices


def mask_mod(layout: Layout, documents: Documents, device: torch.device) -> MaskMod:
    """Return the function of (batch row, head, query token, key token) that says whether they attend."""
    start_of = torch.full((documents.num_rows, documents.num_tokens), -1, dtype=torch.int32)  # -1: padding
    for group in documents.groups:
        start_of[list(group.rows), group.first : group.last] = group.first
    parts = [_split(pattern) for pattern in layout.patterns]
    width = max(starts.shape[1] for _, starts, _ in parts)
    is_global = torch.stack([part[0] for part in parts]).to(device)  # (patterns, N)
    starts, ends = (
        torch.stack([F.pad(part[i], (0, width - part[i].shape[1])) for part in parts]).to(device)
        for i in (1, 2)
    )  # (patterns, N, W)
    start_of = start_of.to(device)
    own = torch.tensor(layout.head_patterns, dtype=torch.int32, device=device)
    block = layout.block

    def attends(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        first, pattern = start_of[batch, query], own[head]
        query_block = torch.where(first >= 0, (query - first) // block, 0)
        key_block = (key - first) // block
        is_same = (first == start_of[batch, key]) & (first >= 0) & (query >= key)
        key_block = torch.where(is_same, key_block, 0)  # another document's block may be none of the layout
        sees = is_global[pattern, key_block]
        for index in range(width):
            is_after = starts[pattern, query_block, index] <= key_block
            sees = sees | (is_after & (key_block < ends[pattern, query_block, index]))
        return is_same & sees

    return attends


def _split(pattern: Intervals) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (N,) bool columns that every row from their own on sees, (N, W) int32 intervals of the rest."""
    num_blocks = pattern.num_rows
    edges = torch.zeros(num_blocks + 1, dtype=torch.int64)
    edges.index_add_(0, pattern.starts, torch.ones_like(pattern.starts))
    edges.index_add_(0, pattern.ends, -torch.ones_like(pattern.ends))
    is_global = edges.cumsum(0)[:-1] == num_blocks - torch.arange(num_blocks)
    num_global = F.pad(is_global.cumsum(0), (1, 0))
    is_rest = num_global[pattern.ends] - num_global[pattern.starts] < pattern.ends - pattern.starts
    rows = pattern.rows[is_rest]
    counts = rows.bincount(minlength=num_blocks)
    place = torch.arange(rows.numel()) - (counts.cumsum(0) - counts)[rows]
    tables = torch.zeros(2, num_blocks, max(1, int(counts.max())), dtype=torch.int32)
    tables[0, rows, place] = pattern.starts[is_rest].to(torch.int32)
    tables[1, rows, place] = pattern.ends[is_rest].to(torch.int32)
    return is_global, tables[0], tables[1]
