"""Tile shapes of the Triton kernels, and a layout's tables and work for them, made when first asked for."""

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import NamedTuple

import torch

from sparse_llama.attention.documents import Documents
from sparse_llama.attention.tables import KeyTables, RowTables, key_tables, row_tables
from sparse_llama.attention.work import key_groups, key_work, row_groups, row_work, send
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import Layout

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 256
Launch = tuple[list[torch.Tensor], list[int]]
"""Tables and work of one kernel, and its ``RowSizes`` or ``KeySizes``: plain arguments of an operation."""


class Tile(NamedTuple):
    """Tokens on the sides of a tile, and how Triton runs it."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tile
    grad_query: Tile
    grad_key: Tile


class RowSizes(NamedTuple):
    """Numbers of a launch that owns queries."""

    num_tiles: int
    queries: int
    keys: int
    key_unit: int
    row_unit: int
    num_warps: int
    num_stages: int


class KeySizes(NamedTuple):
    """Numbers of a launch that owns keys."""

    max_items: int
    max_sums: int
    max_slots: int
    num_heads_each: int
    queries: int
    keys: int
    key_unit: int
    query_unit: int
    num_warps: int
    num_stages: int


def supports(layout: Layout) -> bool:
    """Return whether tiles can be made of the layout's blocks.

    A unit is what block and tile have in common; of units under 4 tokens, 128 have more than an entry has
    bits.
    """
    return gcd(layout.block, 64) >= 4


def choose_tiles(block: int, head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> Tiles:
    """Return the tiles for a GPU of this compute capability; None is Triton's interpreter.

    Chosen by compiling, not by timing (``triton_compile``): the largest that keep to 255 registers a thread,
    with buffers for the loads of later groups where shared memory has room. 128 keys only where blocks fill
    them: in blocks of 16, a tenth more of what they compute would be useless.
    """
    if capability is None:
        return _INTERPRETED
    if dtype == torch.float32:
        return _FP32
    width = next(width for width in (64, 96, 128, 256) if head_dim <= width)
    if capability[0] in (9, 10):
        return _H100_WIDE[width] if block % 128 == 0 else _H100[width]
    return _A100[width] if capability == (8, 0) else _SMALL[width]


_INTERPRETED = Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
# Exact products of fp32 take no tensor cores: whole rows in registers, small tiles.
_FP32 = Tiles(Tile(32, 16, 8, 1), Tile(32, 16, 8, 1), Tile(32, 16, 8, 1))
_A100 = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(32, 64, 4, 3)),
    96: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 64, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 3)),
    256: Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(16, 64, 8, 3)),
}
_H100 = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    96: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 3)),
    256: Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(16, 64, 8, 3)),
}
_H100_WIDE = _H100 | {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    96: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3)),
    128: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3)),
}
# 99 KiB of shared memory: desktop GPUs of every generation
_SMALL = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    96: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),
}


class Utilisation(NamedTuple):
    """Useful pairs of tokens over computed pairs, of each kernel."""

    forward: float
    grad_query: float
    grad_key: float


class TiledLayout:
    """A layout's tables on every device that asked, and the launches of the last batch.

    Tables are made for the crop to a power of two of blocks: a master layout may be far longer than documents
    are. All layers of a model ask about the same batch, so one list of work is kept, not one a layer.
    """

    def __init__(self, layout: Layout, *, tiles: Tiles | None = None, chunk: int | None = None) -> None:
        """Args:
            tiles, chunk: in place of what ``choose_tiles`` and ``key_work`` choose; for tests and tuning.

        Raises:
            ConfigError: the blocks cannot be tiled.
        """
        if not supports(layout):
            raise ConfigError(
                f"sparse_llama.attention.backend: triton cannot tile blocks of {layout.block} tokens; use a "
                "multiple of 16, or backend flex"
            )
        self.layout = layout
        self._tiles, self.chunk = tiles, chunk
        self._rows: dict[tuple[int, int, int], RowTables] = {}
        self._keys: dict[tuple[int, int, int], KeyTables] = {}
        self._sent: dict[tuple[RowTables | KeyTables, torch.device], list[torch.Tensor]] = {}
        self._launches: Launches | None = None

    def rows(self, tile: Tile, num_tokens: int | None = None) -> RowTables:
        """Return the tables of kernels that own queries, for documents of up to ``num_tokens`` or any."""
        layout = self._crop(num_tokens)
        name = (tile.queries, tile.keys, layout.num_blocks)
        if name not in self._rows:
            self._rows[name] = row_tables(layout, queries=tile.queries, keys=tile.keys)
        return self._rows[name]

    def keys(self, tile: Tile, num_tokens: int | None = None) -> KeyTables:
        """Return the tables of the kernel that owns keys, for documents of up to ``num_tokens`` or any."""
        layout = self._crop(num_tokens)
        name = (tile.queries, tile.keys, layout.num_blocks)
        if name not in self._keys:
            self._keys[name] = key_tables(layout, queries=tile.queries, keys=tile.keys)
        return self._keys[name]

    def on(self, device: torch.device, tables: RowTables | KeyTables) -> list[torch.Tensor]:
        """Return a kernel's tables on ``device``, in the order of its launch."""
        if (tables, device) not in self._sent:
            first = [tables.key_units] if isinstance(tables, KeyTables) else []
            heads = torch.tensor(self.layout.head_patterns, dtype=torch.int32)
            full, masked = tables.full, tables.masked
            self._sent[tables, device] = send([*first, full.starts, full.units, *masked, heads], device)
        return self._sent[tables, device]

    def launches(self, documents: Documents, query: torch.Tensor, num_kv_heads: int) -> "Launches":
        """Return the launches of a batch of ``query``'s device, dtype and width.

        Raises:
            ConfigError: the kernels do not take the dtype or the width.
        """
        device, head_dim = query.device, query.shape[3]
        if query.dtype not in DTYPES or head_dim > MAX_WIDTH:
            raise ConfigError(
                "sparse_llama.attention.backend: triton takes fp32, fp16 and bf16 heads of up to "
                f"{MAX_WIDTH}, got {query.dtype} heads of {head_dim}; use auto"
            )
        tiles = self._tiles
        if tiles is None:
            capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
            tiles = choose_tiles(self.layout.block, head_dim, query.dtype, capability)
        wanted = Launches(self, documents, tiles, device, num_kv_heads)
        if self._launches is None or self._launches != wanted:
            self._launches = wanted
        return self._launches

    def num_heads_each(self, num_kv_heads: int) -> int:
        """Return how many query heads a program of the key gradient serves.

        All that share a key/value head, or one where their patterns differ.
        """
        heads = torch.tensor(self.layout.head_patterns).view(num_kv_heads, -1)
        return heads.shape[1] if bool((heads == heads[:, :1]).all()) else 1

    def utilisation(self, num_tokens: int, tiles: Tiles) -> Utilisation:
        """Return how much of what the kernels compute for a document is of use, counted from the tables."""
        heads = list(self.layout.head_patterns)
        pairs = num_tokens * (num_tokens + 1) // 2 * len(heads)
        useful = self.layout.density_at(num_tokens) * pairs

        def of_rows(tile: Tile) -> float:
            groups = row_groups(self.rows(tile, num_tokens), -(-num_tokens // tile.queries))
            return useful / (int(groups[heads].sum()) * tile.queries * tile.keys)

        keys = tiles.grad_key
        groups = key_groups(self.keys(keys, num_tokens), num_tokens)
        of_keys = useful / (int(groups[heads].sum()) * keys.queries * keys.keys)
        return Utilisation(of_rows(tiles.forward), of_rows(tiles.grad_query), of_keys)

    def _crop(self, num_tokens: int | None) -> Layout:
        if num_tokens is None:
            return self.layout
        needed = max(1, self.layout.blocks_of(num_tokens))
        return self.layout.crop(min(1 << (needed - 1).bit_length(), self.layout.num_blocks))


@dataclass(frozen=True)
class Launches:
    """The launches of one batch, each made when first asked for: inference never asks for gradients.

    None is made in inference mode, whose tensors cannot be saved for a later backward pass.
    """

    tiled: TiledLayout
    documents: Documents
    tiles: Tiles
    device: torch.device
    num_kv_heads: int

    @cached_property
    @torch.inference_mode(False)
    def forward(self) -> Launch:
        return self._row_launch(self.tiles.forward)

    @cached_property
    @torch.inference_mode(False)
    def grad_query(self) -> Launch:
        is_same = self.tiles.grad_query == self.tiles.forward
        return self.forward if is_same else self._row_launch(self.tiles.grad_query)

    @cached_property
    @torch.inference_mode(False)
    def grad_key(self) -> Launch:
        tile = self.tiles.grad_key
        tables = self.tiled.keys(tile, self.documents.longest)
        each = self.tiled.num_heads_each(self.num_kv_heads)
        work = key_work(self.documents, tables, keys=tile.keys, num_heads_each=each, chunk=self.tiled.chunk)
        sizes = KeySizes(
            max_items=work.max_items,
            max_sums=work.max_sums,
            max_slots=work.max_slots,
            num_heads_each=each,
            key_unit=tables.key_unit,
            query_unit=tables.query_unit,
            **tile._asdict(),
        )
        lists = send([work.items, work.item_starts, work.sums, work.sum_starts], self.device)
        return [*lists, *self.tiled.on(self.device, tables)], list(sizes)

    def _row_launch(self, tile: Tile) -> Launch:
        tables = self.tiled.rows(tile, self.documents.longest)
        items = send([row_work(self.documents, tile.queries)], self.device)
        sizes = RowSizes(
            num_tiles=tables.num_tiles,
            key_unit=tables.key_unit,
            row_unit=tables.row_unit,
            **tile._asdict(),
        )
        return [*items, *self.tiled.on(self.device, tables)], list(sizes)
