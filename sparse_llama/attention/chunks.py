"""A causal layout cut into kernel calls, each a range of queries and the keys they see: ``blockwise``' list.

A call costs products, queries x keys; for each of its keys the gathering and the adding-up of gradients,
however many queries it has; for each query a merge. So keys that many rows share are taken with many queries
at once: what a whole group of 2,048 tokens sees, then of the rest what a quarter of it sees, and so on. What
is left goes to the *leaves* of about 64 tokens, whose own blocks, the diagonal's, are masked: little is
computed in vain.

A list is linear in the number of active blocks: leaves that look alike share one mask, and a mask that no
other leaf has is kept as the intervals of its rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from sparse_llama.layouts.intervals import Intervals

Spans = tuple[tuple[int, int], ...]
Lines = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Rows, starts and ends of intervals of units, each (R,), sorted."""
_LEAF_TOKENS = 64
_GROUP_LEAVES = (32, 8, 4, 2)  # sizes of a group; each divides the one before
_MIN_SHARED_TOKENS = 192  # keys that a group must share to get a call of their own


@dataclass(frozen=True, eq=False)
class Part:
    """One kernel call."""

    first: int
    last: int
    """Query tokens [first, last)."""
    spans: Spans
    """Key tokens [start, end), in order."""
    leaf: "LeafMask | None" = None
    """None where every query sees every key."""

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.spans)

    def mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the additive (queries, keys) mask, 0 or -inf; None where every query sees every key."""
        if self.leaf is None:
            return None
        return self.leaf.tokens(self.last - self.first, self.num_keys, dtype)


@dataclass(eq=False)
class LeafMask:
    """Which units of keys the units of queries of a leaf see; the last keys are the leaf's own, causal."""

    num_rows: int
    num_columns: int
    lines: tuple[tuple[int, int, int], ...]
    """(row, first column, end) of what is seen; empty is everything."""
    unit: int
    """Tokens."""
    is_shared: bool = False
    """Whether several leaves have this mask. Its tokens are then kept; others are made for every call."""
    _kept: torch.Tensor | None = None

    def tokens(self, num_queries: int, num_keys: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the additive (queries, keys) mask; the last unit may be ragged."""
        shape = (num_queries, num_keys)
        if self._kept is not None and self._kept.dtype == dtype and self._kept.shape == shape:
            return self._kept
        table = torch.full((self.num_rows, self.num_columns), -torch.inf if self.lines else 0.0, dtype=dtype)
        for row, start, end in self.lines:
            table[row, start:end] = 0.0
        blocks = table[:, None, :, None].expand(-1, self.unit, -1, self.unit)
        mask = blocks.reshape(self.num_rows * self.unit, -1)[:num_queries, :num_keys].contiguous()
        mask[:, num_keys - num_queries :] += torch.full((num_queries,) * 2, -torch.inf, dtype=dtype).triu_(1)
        if self.is_shared:
            self._kept = mask
        return mask


@dataclass(frozen=True)
class Parts:
    """The calls of one document."""

    leaves: tuple[Part, ...]
    """Every query is in one of them."""
    shared: tuple[Part, ...]
    """Further keys of queries."""


def cut_into_parts(pattern: Intervals, block: int, num_tokens: int) -> Parts:
    """Return the calls for a document of ``num_tokens`` under a causal ``pattern`` of blocks.

    Blocks of 128 and more are cut into units of 64 tokens first, so that the diagonal wastes no more there.
    """
    unit = _LEAF_TOKENS if block % _LEAF_TOKENS == 0 else block
    lines = _refine(pattern.first_rows(-(-num_tokens // block)), block // unit)
    num_units = -(-num_tokens // unit)
    leaf_size = max(1, _LEAF_TOKENS // unit)
    taken: list[_Stretches] = []
    for num_leaves in _GROUP_LEAVES:
        taken.append(_shared(lines, num_units, num_leaves * leaf_size, taken, _MIN_SHARED_TOKENS // unit))
    leaves = _leaves(lines, num_units, leaf_size, taken, unit, num_tokens)
    shared = (part for stretches in taken for part in stretches.parts(unit, num_tokens))
    return Parts(tuple(leaves), tuple(shared))


@dataclass(frozen=True)
class _Stretches:
    """Units of keys [starts, ends) that the groups of ``size`` units of queries see, sorted."""

    size: int
    groups: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor

    def where(self, keep: torch.Tensor) -> "_Stretches":
        return _Stretches(self.size, self.groups[keep], self.starts[keep], self.ends[keep])

    def by_group(self) -> dict[int, list[tuple[int, int]]]:
        found: dict[int, list[tuple[int, int]]] = {}
        for group, start, end in zip(
            *(t.tolist() for t in (self.groups, self.starts, self.ends)), strict=True
        ):
            found.setdefault(group, []).append((start, end))
        return found

    def parts(self, unit: int, num_tokens: int) -> Iterator[Part]:
        width = self.size * unit
        for group, keys in self.by_group().items():
            yield Part(group * width, min((group + 1) * width, num_tokens), _spans(keys, unit))


def _refine(pattern: Intervals, times: int) -> Lines:
    """Return the intervals of a causal pattern whose blocks are cut in ``times``, causal again."""
    rows = (pattern.rows[:, None] * times + torch.arange(times)).flatten()
    ends = (pattern.ends * times).repeat_interleave(times).minimum(rows + 1)
    return rows, (pattern.starts * times).repeat_interleave(times), ends


def _shared(lines: Lines, num_units: int, size: int, taken: list[_Stretches], min_units: int) -> _Stretches:
    """Return what all rows of a group see and no group around it has taken, where that is worth a call."""
    seen, counts = _count(lines, num_units, size, taken)
    seen = seen.where(counts == (num_units - seen.groups * size).clamp(max=size))
    widths = torch.zeros(-(-num_units // size), dtype=torch.int64)
    widths.index_add_(0, seen.groups, seen.ends - seen.starts)
    return seen.where(widths[seen.groups] >= min_units)


def _count(
    lines: Lines, num_units: int, size: int, taken: list[_Stretches]
) -> tuple[_Stretches, torch.Tensor]:
    """Return stretches of the units left of each group that some of its rows see, and how many rows do.

    What a larger group around it has taken is left out.
    """
    rows, starts, ends = lines
    groups = rows // size
    parts = [(groups, starts, ends.minimum(groups * size), torch.ones_like(rows))]
    for larger in taken:
        times = larger.size // size
        inner = (larger.groups[:, None] * times + torch.arange(times)).flatten()
        firsts, lasts = (bound.repeat_interleave(times) for bound in (larger.starts, larger.ends))
        parts.append((inner, firsts, lasts, torch.full_like(inner, -size)))  # at most ``size`` rows see it
    groups, starts, ends, weights = (torch.cat([part[index] for part in parts]) for index in range(4))
    is_real = (starts < ends) & (groups * size < num_units)
    groups, starts, ends, weights = (tensor[is_real] for tensor in (groups, starts, ends, weights))
    # One number line with a stretch for each group: counting is then one running sum.
    width = num_units + 1
    places = torch.cat([groups * width + starts, groups * width + ends])
    edges, where = torch.unique(places, return_inverse=True)
    changes = torch.zeros_like(edges).index_add_(0, where, torch.cat([weights, -weights]))
    counts = changes.cumsum(0)[:-1]
    is_seen = counts > 0
    firsts, lasts = edges[:-1][is_seen], edges[1:][is_seen]
    owner = firsts // width
    return _Stretches(size, owner, firsts - owner * width, lasts - owner * width), counts[is_seen]


def _leaves(
    lines: Lines, num_units: int, size: int, taken: list[_Stretches], unit: int, num_tokens: int
) -> Iterator[Part]:
    """Yield the parts of all groups of ``size`` rows: what is left of their keys, and their own units."""
    left = _count(lines, num_units, size, taken)[0].by_group()
    rows, starts, ends = lines
    bounds = torch.searchsorted(rows, torch.arange(0, num_units + size, size)).tolist()
    masks: dict[object, LeafMask] = {}
    for group, top in enumerate(range(0, num_units, size)):
        bottom = min(top + size, num_units)
        keys = [*left.get(group, ()), (top, bottom)]
        inside = slice(bounds[group], bounds[group + 1])
        first, last = top * unit, min(bottom * unit, num_tokens)
        spans = _spans(keys, unit, last)
        lines_inside = (rows[inside] - top, starts[inside], ends[inside])
        # Where a leaf is one row, it sees all of its keys.
        seen = () if size == 1 else _lines_of(keys, *lines_inside)
        key = (last - first, sum(end - start for start, end in keys), seen)
        if key in masks:
            masks[key].is_shared = True
        else:
            masks[key] = LeafMask(bottom - top, *key[1:], unit)
        yield Part(first, last, spans, masks[key])


def _lines_of(
    keys: list[tuple[int, int]], rows: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> tuple[tuple[int, int, int], ...]:
    """Return a leaf's intervals (row, start, end) counted in the units of its ``keys``."""
    columns = torch.cat([torch.arange(start, end) for start, end in keys])
    firsts, lasts = torch.searchsorted(columns, starts), torch.searchsorted(columns, ends)
    lines = zip(rows.tolist(), firsts.tolist(), lasts.tolist(), strict=True)
    return tuple(line for line in lines if line[1] < line[2])


def _spans(keys: Iterable[tuple[int, int]], unit: int, end_token: int | None = None) -> Spans:
    """Return stretches of units as tokens, merged where they touch, up to ``end_token``."""
    merged: list[tuple[int, int]] = []
    for start, end in keys:
        first, last = start * unit, end * unit if end_token is None else min(end * unit, end_token)
        if merged and merged[-1][1] == first:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return tuple(merged)
