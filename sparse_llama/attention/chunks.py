"""A causal layout cut into chunks of query rows, each with the keys it needs: the work list of ``blockwise``.

A chunk is a few block rows. Keys that all its rows see need no mask; the others (window edges, the diagonal,
random blocks) go into one small masked part. Masks are shared between chunks that look alike, and a layout
looks alike nearly everywhere, so a list is linear in the number of active blocks and megabytes at most.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch

from sparse_llama.layouts.intervals import Intervals

Spans = tuple[tuple[int, int], ...]
_CHUNK_TOKENS = 128  # measured best of 64, 128, 256, 512 for block 64, 8 heads of 64: masks stay in cache


@dataclass(frozen=True, eq=False)
class Part:
    """Keys that one kernel call covers."""

    spans: Spans
    """Key tokens [first, last), in order."""
    mask: torch.Tensor | None
    """(chunk tokens, key tokens) bool; None where every query sees every key."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Query tokens [first, last) and what they attend to."""

    first: int
    last: int
    parts: tuple[Part, ...]


def cut_into_chunks(pattern: Intervals, block: int, num_tokens: int) -> tuple[Chunk, ...]:
    """Return the chunks of a document of ``num_tokens`` under a causal ``pattern`` of blocks."""
    num_blocks = -(-num_tokens // block)
    crop = pattern.first_rows(num_blocks)
    rows_each = max(1, _CHUNK_TOKENS // block)
    bounds = crop.row_starts.tolist()
    starts, ends, rows = crop.starts.tolist(), crop.ends.tolist(), crop.rows.tolist()
    masks: dict[object, torch.Tensor] = {}
    chunks: list[Chunk] = []
    for top in range(0, num_blocks, rows_each):
        bottom = min(top + rows_each, num_blocks)
        inside = range(bounds[top], bounds[bottom])
        lines = [(rows[index] - top, starts[index], ends[index]) for index in inside]
        first, last = top * block, min(bottom * block, num_tokens)
        chunks.append(Chunk(first, last, _parts(lines, top, bottom, block, first, last, masks)))
    return tuple(chunks)


def _parts(
    lines: list[tuple[int, int, int]],
    top: int,
    bottom: int,
    block: int,
    first: int,
    last: int,
    masks: dict[object, torch.Tensor],
) -> tuple[Part, ...]:
    """Return the parts of block rows [top, bottom), whose intervals are ``lines`` of (row, start, end)."""
    seen_by = _coverage(lines, top)
    parts: list[Part] = []
    shared = [(start, end) for start, end, count in seen_by if count == bottom - top]
    if shared:
        parts.append(Part(_merge((start * block, end * block) for start, end in shared), None))
    uneven = [(start, end) for start, end, count in seen_by if 0 < count < bottom - top]
    # The diagonal blocks are uneven by tokens whatever the blocks say; they are always there.
    uneven.append((top, bottom))
    blocks = [one for start, end in uneven for one in range(start, end)]
    place = {one: index for index, one in enumerate(blocks)}
    table = [(row, place[one]) for row, start, end in lines for one in range(start, end) if one in place]
    key = (last - first, len(blocks), tuple(table))
    mask = masks.get(key)
    if mask is None:
        mask = masks[key] = _token_mask(table, bottom - top, len(blocks), block, last - first)
    spans = _merge((start * block, min(end * block, last)) for start, end in uneven)
    parts.append(Part(spans, None if mask.all() else mask))
    return tuple(parts)


def _coverage(lines: list[tuple[int, int, int]], top: int) -> list[tuple[int, int, int]]:
    """Return (start, end, rows that see it) for the stretches of blocks left of the diagonal, in order."""
    edges: dict[int, int] = {}
    for _, start, end in lines:
        end = min(end, top)
        if start < end:
            edges[start] = edges.get(start, 0) + 1
            edges[end] = edges.get(end, 0) - 1
    marks = sorted(edges)
    stretches: list[tuple[int, int, int]] = []
    count = 0
    for mark, following in pairwise(marks):
        count += edges[mark]
        stretches.append((mark, following, count))
    return stretches


def _token_mask(
    table: list[tuple[int, int]], num_rows: int, num_blocks: int, block: int, num_queries: int
) -> torch.Tensor:
    """Return (queries, keys) bool: the blocks of ``table``, the last of which are the diagonal's: causal."""
    seen = torch.zeros(num_rows, num_blocks, dtype=torch.bool)
    for row, column in table:
        seen[row, column] = True
    tokens = seen.repeat_interleave(block, 0).repeat_interleave(block, 1)
    before_diagonal = (num_blocks - num_rows) * block
    tokens = tokens[:num_queries, : before_diagonal + num_queries]  # the last block may be ragged
    return tokens.tril(diagonal=before_diagonal)


def _merge(spans: Iterable[tuple[int, int]]) -> Spans:
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)
