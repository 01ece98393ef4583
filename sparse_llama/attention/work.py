"""What the Triton kernels do in one batch: lists of tiles of its documents, for the tables of ``tables``.

Forward and query gradient: an item is a tile of queries of one document. Key gradient: a tile of keys of one
document, or a *chunk* of what reads it: all rows read a global column, and one program that walks along all
of them would still run when the others are done. Chunks write fp32 partial sums, each to a slot of its own,
and a *sum* adds a tile's slots in their order: no atomics, the same bits every time. Heavy items come first,
so that light ones fill the gaps at the end.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from sparse_llama.attention.documents import Documents, whole_rows
from sparse_llama.attention.tables import Entries, KeyTables, RowTables

_CHUNK = 32  # groups of queries, all query heads of a program together: some 30 us, against 5 for a launch
_ALIGNED = 4  # int32: Triton compiles a kernel anew for a pointer that is not a multiple of 16 bytes


class KeyWork(NamedTuple):
    """The items and sums of all patterns, one pattern after the other."""

    items: torch.Tensor
    """(items, 9) int32: row of the batch, first token and length of the document, line of the table, groups
    [begin, end) of its full and of its masked list, slot; slot -1 is a whole tile, written at once."""
    item_starts: torch.Tensor
    """(patterns + 1,) int32."""
    sums: torch.Tensor
    """(sums, 6) int32: row, first token, length, line, slots [begin, end)."""
    sum_starts: torch.Tensor
    """(patterns + 1,) int32."""
    max_items: int
    max_sums: int
    max_slots: int
    """Of any pattern."""


def row_work(documents: Documents, queries: int) -> torch.Tensor:
    """Return (items, 4) int32: row of the batch, first token and length of the document, tile of queries.

    Late tiles come first: where columns are global, they see the most.
    """
    table = _table(documents)
    num_tiles = -(-table[:, 2] // queries)
    owner, tile = _count_up(num_tiles)
    order = torch.argsort(tile, descending=True, stable=True)
    return torch.cat([table[owner], tile[:, None]], 1)[order].to(torch.int32)


def key_work(
    documents: Documents, tables: KeyTables, *, keys: int, num_heads_each: int, chunk: int | None = None
) -> KeyWork:
    """Return the work of the key gradient.

    Args:
        keys: tokens of a tile.
        num_heads_each: query heads that a program walks along the rows for.
        chunk: groups of queries that one program takes at most, for each of its heads. None chooses: a few
            microseconds' work, more where partial sums would be over a quarter of the bytes of 16-bit dk and
            dv.
    """
    budget = documents.num_rows * documents.num_tokens // (8 * keys)  # slots of 8 bytes; dk + dv are 4
    items: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    num_slots: list[int] = []
    for lines in _lines(tables):
        tiles = _tiles_of_documents(documents, tables, *lines)
        size = chunk if chunk is not None else _choose_chunk(tiles, max(1, _CHUNK // num_heads_each), budget)
        own_items, own_sums = _cut(tiles, size)
        items.append(own_items)
        sums.append(own_sums)
        num_slots.append(int(own_sums[:, 5].max()) if len(own_sums) else 0)
    return KeyWork(
        torch.cat(items).to(torch.int32),
        _bounds(items),
        torch.cat(sums).to(torch.int32),
        _bounds(sums),
        max(map(len, items)),
        max(map(len, sums)),
        max(num_slots),
    )


def row_groups(tables: RowTables, num_tiles: int) -> torch.Tensor:
    """Return (patterns,) the groups that the first ``num_tiles`` tiles of queries visit, all together."""
    counts = (tables.full.starts + tables.masked.starts).diff().view(-1, tables.num_tiles)
    return counts[:, :num_tiles].sum(1)


def key_groups(tables: KeyTables, num_tokens: int) -> torch.Tensor:
    """Return (patterns,) the groups that visit the tiles of keys of one document, all together."""
    document = whole_rows(1, num_tokens)
    tiles = [_tiles_of_documents(document, tables, *lines) for lines in _lines(tables)]
    return torch.stack([tile.num_groups.sum() for tile in tiles])


def send(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return int32 tensors on ``device``, by one copy."""
    if device.type == "cpu":
        return tensors
    sizes = [-(-tensor.numel() // _ALIGNED) * _ALIGNED for tensor in tensors]
    packed = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=True)
    for place, tensor in zip(packed.split(sizes), tensors, strict=True):
        place[: tensor.numel()] = tensor.flatten()
    there = packed.to(device, non_blocking=True).split(sizes)
    return [place[: tensor.numel()].view(tensor.shape) for place, tensor in zip(there, tensors, strict=True)]


class _Tiles(NamedTuple):
    """Tiles of keys of documents, and the groups of their lists that begin inside the document."""

    documents: torch.Tensor
    """(tiles, 3): row, first token, length."""
    line: torch.Tensor
    full_starts: torch.Tensor
    num_full: torch.Tensor
    masked_starts: torch.Tensor
    num_masked: torch.Tensor

    @property
    def num_groups(self) -> torch.Tensor:
        return self.num_full + self.num_masked


def _tiles_of_documents(
    documents: Documents, tables: KeyTables, first: int, first_light: int, last: int
) -> _Tiles:
    """Return one pattern's tiles, lines [first, last), that hold a key of a document, for all documents."""
    table = _table(documents)
    lengths = table[:, 2].contiguous()
    # Units ascend in each group of tiles: those that begin before the document's end are its first ones.
    tile_starts = tables.first_units[first:last] * tables.key_unit
    num_heavy = torch.searchsorted(tile_starts[: first_light - first], lengths)
    num_light = torch.searchsorted(tile_starts[first_light - first :], lengths)
    owner, line = _count_up(num_heavy + num_light)
    line = line + torch.where(line < num_heavy[owner], first, first_light - num_heavy[owner])
    limit = -(-lengths // tables.query_unit)[owner]
    full, num_full = _groups_before(tables.full, tables.full_order, tables.order_width, line, limit)
    masked, num_masked = _groups_before(tables.masked, tables.masked_order, tables.order_width, line, limit)
    return _Tiles(table[owner], line, full, num_full, masked, num_masked)


def _lines(tables: KeyTables) -> Iterator[tuple[int, int, int]]:
    """Yield the first line, the first of ordinary weight and the end of every pattern."""
    first = 0
    for num_tiles, num_heavy in zip(tables.num_tiles, tables.num_heavy_tiles, strict=True):
        yield first, first + num_heavy, first + num_tiles
        first += num_tiles


def _groups_before(
    entries: Entries, order: torch.Tensor, width: int, line: torch.Tensor, limit: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first group of each line, and how many of its groups begin with a unit below ``limit``."""
    starts = entries.starts.to(torch.int64)[line]
    return starts, torch.searchsorted(order, line * width + limit) - starts


def _choose_chunk(tiles: _Tiles, smallest: int, budget: int) -> int:
    size, groups = smallest, tiles.num_groups
    while int((-(-groups // size))[groups > size].sum()) > budget:
        size *= 2
    return size


def _cut(tiles: _Tiles, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return items and sums of tiles, those with more than ``chunk`` groups cut into equal parts."""
    groups = tiles.num_groups
    parts = -(-groups // chunk)
    size = -(-groups // parts)
    owner, part = _count_up(parts)
    begin = part * size[owner]
    end = (begin + size[owner]).minimum(groups[owner])
    is_split = parts > 1
    slots = torch.where(is_split, parts, 0)
    first_slot = slots.cumsum(0) - slots
    full, masked, num_full = tiles.full_starts[owner], tiles.masked_starts[owner], tiles.num_full[owner]
    items = torch.stack(
        [
            tiles.line[owner],
            full + begin.minimum(num_full),
            full + end.minimum(num_full),
            masked + (begin - num_full).clamp(min=0),
            masked + (end - num_full).clamp(min=0),
            torch.where(is_split[owner], first_slot[owner] + part, -1),
        ],
        1,
    )
    items = torch.cat([tiles.documents[owner], items], 1)
    sums = torch.stack([tiles.line, first_slot, first_slot + slots], 1)
    order = torch.argsort(end - begin, descending=True, stable=True)
    return items[order], torch.cat([tiles.documents, sums], 1)[is_split]


def _table(documents: Documents) -> torch.Tensor:
    """Return (documents, 3) int64: row, first token, length."""
    lines = [(row, group.first, group.num_tokens) for group in documents.groups for row in group.rows]
    return torch.tensor(lines, dtype=torch.int64).view(-1, 3)


def _count_up(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each i counts[i] times i, and 0, 1, 2, ... beside it."""
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


def _bounds(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([0, *map(len, parts)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
