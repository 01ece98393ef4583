"""Lookup tables of the Triton kernels: what a tile of queries reads, and what a tile of keys is read by.

A kernel multiplies tiles of 64 or 128 tokens, a layout may have blocks of 16. So a tile is no stretch of the
sequence on both sides: the side that a kernel walks along is made of *units* of gcd(block, tile) tokens that
need not be neighbours ("packing"). A group of units fills a tile. A list has the units that a tile of the
other side meets, each with a bit for every part of that tile that does. There are two, for where all of the
tile meets a unit, no mask is needed:

    full      whole groups of units that every token of the tile attends to (or is attended by)
    masked    the rest: a bit per part of the tile, and the token-causal triangle

Tables know a layout and no batch: tokens count from the start of a document, and a shorter document, a crop
of the layout, uses the beginning of every list (``work``). Memory is in proportion to the active blocks. All
lists are made by ``_overlay``, a sweep over the ends of intervals; nothing loops over rows.
"""

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import NamedTuple

import torch

from sparse_llama.layouts import Layout
from sparse_llama.layouts.intervals import Intervals

MAX_PARTS = 32
"""Bits of an entry."""
_HEAVY = (
    3.0  # times the median: seen this often, a block of keys is tiled with others like it, not its neighbours
)


class Entries(NamedTuple):
    """A list of units for every line, as compressed sparse rows; every list fills whole groups."""

    starts: torch.Tensor
    """(lines + 1,) int32: line i owns groups starts[i] to starts[i + 1]."""
    units: torch.Tensor
    """((groups + 1) * units a group,) int32, ascending in a list. Padding, and the last group, is the first
    unit after the layout: no document is that long, and what masks a document's end masks it too."""
    bits: torch.Tensor
    """Of the same shape: which parts of the line's tile see the unit. Empty for full lists."""

    def to(self, device: torch.device) -> "Entries":
        return Entries(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True, eq=False)
class RowTables:
    """The units of keys that tiles of queries read; a line is a tile, one pattern after the other."""

    full: Entries
    masked: Entries
    num_tiles: int
    """Of each pattern."""
    key_unit: int
    row_unit: int
    """Tokens of a part of the tile."""


@dataclass(frozen=True, eq=False)
class KeyTables:
    """The units of queries that read tiles of keys; a line is a tile, one pattern after the other.

    Keys that many rows see (global blocks) are tiled together, and the others together: a tile of neighbours
    with one global block among them would visit every row that sees the one. Both kinds stay in order, so
    that the crop to a shorter document is a prefix of each.
    """

    key_units: torch.Tensor
    """(lines * units a tile,) int32; padding as in ``Entries``."""
    full: Entries
    masked: Entries
    num_tiles: tuple[int, ...]
    """Of each pattern."""
    num_heavy_tiles: tuple[int, ...]
    """How many of them, the first ones, hold keys that many rows see."""
    key_unit: int
    query_unit: int
    num_query_units: int
    units_per_group: int
    """Of queries."""

    @property
    def order_width(self) -> int:
        """Distance of two lines on the number line of ``full_order`` and ``masked_order``."""
        return self.num_query_units + 1

    @cached_property
    def full_order(self) -> torch.Tensor:
        """(groups,) int64, ascending: line * ``order_width`` + the group's first unit."""
        return self._order(self.full)

    @cached_property
    def masked_order(self) -> torch.Tensor:
        return self._order(self.masked)

    @cached_property
    def first_units(self) -> torch.Tensor:
        """(lines,) int64, the first unit of every tile."""
        return self.key_units.view(len(self.full.starts) - 1, -1)[:, 0].to(torch.int64)

    def _order(self, entries: Entries) -> torch.Tensor:
        starts = entries.starts.to(torch.int64)
        lines = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
        return lines * self.order_width + entries.units[:: self.units_per_group][:-1]


def row_tables(layout: Layout, *, queries: int, keys: int) -> RowTables:
    """Return the tables of kernels that own ``queries`` tokens and walk along keys, ``keys`` at a time."""
    block, num_tokens = layout.block, layout.num_tokens
    key_unit, row_unit = gcd(block, keys), gcd(block, queries)
    assert queries // row_unit <= MAX_PARTS
    parts, num_tiles = queries // row_unit, -(-num_tokens // queries)
    tiles = torch.arange(num_tiles)
    # Rows after the layout's last token do not exist: the last tile is full without them.
    everyone = (1 << (num_tokens // row_unit - tiles * parts).clamp(max=parts)) - 1
    # A unit below the diagonal: its last token is not after the tile's first.
    full_ends = (tiles * queries + 1) // key_unit
    lists: list[_Cells] = []
    for index, pattern in enumerate(layout.patterns):
        segments = _row_segments(pattern, block, key_unit, row_unit, parts)
        lists.append(_split(segments, everyone, full_ends, torch.zeros_like(full_ends), index * num_tiles))
    num_lines = len(layout.patterns) * num_tiles
    cells = _join(lists)
    # Units that all see but that fill no group go to the masked list: full groups have no padding to mask.
    per_group = keys // key_unit
    count = torch.bincount(cells.lines[cells.is_full], minlength=num_lines)
    place = torch.arange(int(cells.is_full.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
    is_left_over = place >= (count // per_group * per_group).repeat_interleave(count)
    is_full = cells.is_full.clone()
    is_full[cells.is_full] = ~is_left_over
    full, masked = _pack(cells, is_full, num_lines, per_group, num_tokens // key_unit)
    return RowTables(full, masked, num_tiles, key_unit, row_unit)


def key_tables(layout: Layout, *, queries: int, keys: int) -> KeyTables:
    """Return the tables of a kernel that owns ``keys`` tokens and walks along ``queries`` at a time."""
    block, num_tokens = layout.block, layout.num_tokens
    key_unit, query_unit = gcd(block, keys), gcd(block, queries)
    assert keys // key_unit <= MAX_PARTS
    parts, padding = keys // key_unit, num_tokens // key_unit
    units: list[torch.Tensor] = []
    lists: list[_Cells] = []
    num_tiles: list[int] = []
    num_heavy_tiles: list[int] = []
    for pattern in layout.patterns:
        columns = transpose(pattern)
        groups = [_units_of(blocks, block // key_unit, parts, padding) for blocks in _by_weight(columns)]
        table = torch.cat(groups)  # (tiles * parts,)
        segments = _column_segments(columns, table, block, key_unit, query_unit, parts)
        is_real = (table < padding).view(-1, parts)
        everyone = (is_real * (1 << torch.arange(parts))).sum(1)
        last = torch.where(is_real, table.view(-1, parts), -1).amax(1)
        # From here on every query is after every key of the tile.
        full_starts = -(-((last + 1) * key_unit - 1) // query_unit)
        full_ends = torch.full_like(full_starts, num_tokens // query_unit)
        lists.append(_split(segments, everyone, full_ends, full_starts, sum(num_tiles)))
        units.append(table)
        num_tiles.append(len(table) // parts)
        num_heavy_tiles.append(len(groups[0]) // parts)
    cells = _join(lists)
    full, masked = _pack(
        cells, cells.is_full, sum(num_tiles), queries // query_unit, num_tokens // query_unit
    )
    return KeyTables(
        _int32(torch.cat(units)),
        full,
        masked,
        tuple(num_tiles),
        tuple(num_heavy_tiles),
        key_unit,
        query_unit,
        num_tokens // query_unit,
        queries // query_unit,
    )


def transpose(pattern: Intervals) -> Intervals:
    """Return the rows that see each block, as intervals: a column of a window or a global column is one."""
    num_blocks = pattern.num_rows
    rows = pattern.rows
    # Row i and the row before it on one line: what only the first has begins at i, the second ends there.
    both = _overlay(
        torch.cat([rows, rows + 1]),
        torch.cat([pattern.starts, pattern.starts]),
        torch.cat([pattern.ends, pattern.ends]),
        torch.tensor([1, 2]).repeat_interleave(len(rows)),
        num_blocks + 1,
    )
    changes = both.bits != 3
    owner, columns = _expand(both.starts[changes], both.ends[changes])
    at = both.lines[changes][owner]
    is_start = both.bits[changes][owner] == 1
    starts, ends = (
        torch.sort((columns * (num_blocks + 1) + at)[mask]).values for mask in (is_start, ~is_start)
    )
    counts = torch.bincount(columns[is_start], minlength=num_blocks)
    bounds = torch.zeros(num_blocks + 1, dtype=torch.int64)
    bounds[1:] = counts.cumsum(0)
    return Intervals(bounds, starts % (num_blocks + 1), ends % (num_blocks + 1))


class _Segments(NamedTuple):
    """Units [starts, ends) of lines, disjoint and in order, each with the bits that cover it."""

    lines: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    bits: torch.Tensor


class _Cells(NamedTuple):
    """Single units of lines, in order."""

    lines: torch.Tensor
    units: torch.Tensor
    bits: torch.Tensor
    is_full: torch.Tensor


def _row_segments(pattern: Intervals, block: int, key_unit: int, row_unit: int, parts: int) -> _Segments:
    """Return what the tiles of queries see: units of keys, a bit per row unit of the tile."""
    per_block = block // row_unit
    units = (pattern.rows[:, None] * per_block + torch.arange(per_block)).flatten()
    starts, ends = (
        (edge * (block // key_unit)).repeat_interleave(per_block) for edge in (pattern.starts, pattern.ends)
    )
    ends = ends.minimum(-(-(units + 1) * row_unit // key_unit))  # nothing after the unit's last token
    return _overlay(
        units // parts, starts, ends, 1 << units % parts, pattern.num_rows * block // key_unit + 1
    )


def _column_segments(
    columns: Intervals, table: torch.Tensor, block: int, key_unit: int, query_unit: int, parts: int
) -> _Segments:
    """Return what sees the tiles of keys: units of queries, a bit per key unit of the tile."""
    per_block, num_units = block // key_unit, columns.num_rows * (block // key_unit)
    place = torch.empty(num_units + 1, dtype=torch.int64)
    place[table] = torch.arange(len(table))  # padding all lands on the one place after the last unit
    units = (columns.rows[:, None] * per_block + torch.arange(per_block)).flatten()
    starts, ends = (
        (edge * (block // query_unit)).repeat_interleave(per_block) for edge in (columns.starts, columns.ends)
    )
    starts = starts.maximum(units * key_unit // query_unit)  # nothing before the unit's first token
    places = place[units]
    width = columns.num_rows * block // query_unit + 1
    return _overlay(places // parts, starts, ends, 1 << places % parts, width)


def _by_weight(columns: Intervals) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the blocks that many rows see, and the others, each in order."""
    seen_by = torch.zeros(columns.num_rows, dtype=torch.int64)
    seen_by.index_add_(0, columns.rows, columns.ends - columns.starts)
    is_heavy = seen_by > _HEAVY * seen_by.median()
    return is_heavy.nonzero().flatten(), (~is_heavy).nonzero().flatten()


def _units_of(blocks: torch.Tensor, per_block: int, parts: int, padding: int) -> torch.Tensor:
    """Return the units of blocks in order, padded to whole tiles."""
    units = (blocks[:, None] * per_block + torch.arange(per_block)).flatten()
    return torch.cat([units, units.new_full((-len(units) % parts,), padding)])


def _overlay(
    lines: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, bits: torch.Tensor, width: int
) -> _Segments:
    """Cut intervals where others of their line begin or end; return the pieces, each with all bits there.

    No two intervals of a line with the same bit overlap. Ends are below ``width``.
    """
    edges, order = torch.cat([lines * width + starts, lines * width + ends]).sort()
    # From an edge to the next these bits are on; none are after the last edge of a line.
    covering = torch.cat([bits, -bits])[order].cumsum(0)[:-1]
    is_piece = (edges[1:] > edges[:-1]) & (covering != 0)
    first, last = edges[:-1][is_piece], edges[1:][is_piece]
    return _Segments(first // width, first % width, last - first // width * width, covering[is_piece])


def _split(
    segments: _Segments,
    everyone: torch.Tensor,
    full_ends: torch.Tensor,
    full_starts: torch.Tensor,
    first_line: int,
) -> _Cells:
    """Return the units of segments; full are those of all bits in [full_starts, full_ends) of their line."""
    owner, units = _expand(segments.starts, segments.ends)
    lines, bits = segments.lines[owner], segments.bits[owner]
    is_full = (bits == everyone[lines]) & (units >= full_starts[lines]) & (units < full_ends[lines])
    return _Cells(lines + first_line, units, bits, is_full)


def _join(lists: list[_Cells]) -> _Cells:
    return lists[0] if len(lists) == 1 else _Cells(*(torch.cat(parts) for parts in zip(*lists, strict=True)))


def _expand(starts: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of [starts, ends), one interval after the other, and which interval each is of."""
    sizes = ends - starts
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)
    return owner, torch.arange(len(owner)) - (sizes.cumsum(0) - sizes - starts)[owner]


def _pack(
    cells: _Cells, is_full: torch.Tensor, num_lines: int, per_group: int, padding: int
) -> tuple[Entries, Entries]:
    return (
        _pad(cells.lines[is_full], cells.units[is_full], None, num_lines, per_group, padding),
        _pad(
            cells.lines[~is_full], cells.units[~is_full], cells.bits[~is_full], num_lines, per_group, padding
        ),
    )


def _pad(
    lines: torch.Tensor,
    units: torch.Tensor,
    bits: torch.Tensor | None,
    num_lines: int,
    per_group: int,
    padding: int,
) -> Entries:
    count = torch.bincount(lines, minlength=num_lines)
    starts = torch.zeros(num_lines + 1, dtype=torch.int64)
    starts[1:] = (-(-count // per_group)).cumsum(0)
    place = torch.arange(len(lines)) + (starts[:-1] * per_group - (count.cumsum(0) - count))[lines]
    num_places = (int(starts[-1]) + 1) * per_group  # kernels fetch a group ahead
    padded = torch.full((num_places,), padding)
    padded[place] = units
    placed_bits = torch.zeros(0 if bits is None else num_places, dtype=torch.int64)
    if bits is not None:
        placed_bits[place] = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)  # bit 31 is int32's sign
    return Entries(_int32(starts), _int32(padded), _int32(placed_bits))


def _int32(tensor: torch.Tensor) -> torch.Tensor:
    """Return int32 numbers, which kernels use as offsets into tables of the same kind."""
    assert tensor.numel() < 2**31, "more entries than int32 counts"
    return tensor.to(torch.int32)
