"""The Triton kernels' tables and work, expanded to token pairs again, against the layout's definition."""

import math

import pytest
import torch
from attention.test_cores import MODES
from oracles.masked_attention import token_table

from sparse_llama.attention.documents import find_documents, whole_rows
from sparse_llama.attention.tables import Entries, KeyTables, RowTables, key_tables, row_tables, transpose
from sparse_llama.attention.tiles import Tile, TiledLayout, Tiles, supports
from sparse_llama.attention.work import KeyWork, key_work, row_work
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import Layout, build_layout

SPARSE = [mode for mode, options in MODES.items() if options is not None]
SHAPES = [(64, 64), (128, 64), (32, 128), (64, 16)]
LENGTHS = [1, 40, 128, 291, 333]


def layout_of(mode: str, block: int, num_tokens: int = 333, num_heads: int = 4) -> Layout:
    options = MODES[mode]
    assert options is not None
    num_blocks = max(6, -(-num_tokens // block))
    sparsity = parse_sparsity(options | {"block": block})
    return build_layout(sparsity, num_heads=num_heads, num_blocks=num_blocks, seed=3)


def groups_of(entries: Entries, first: int, last: int, per_group: int) -> list[tuple[list[int], list[int]]]:
    """Return units and bits of each group of [first, last)."""
    bits = entries.bits if len(entries.bits) else torch.full_like(entries.units, -1)  # all ones
    pick = [slice(group * per_group, (group + 1) * per_group) for group in range(first, last)]
    return [(entries.units[own].tolist(), bits[own].tolist()) for own in pick]


def tokens_of(unit: int, size: int, limit: int) -> torch.Tensor:
    return torch.arange(min(unit * size, limit), min((unit + 1) * size, limit))


def visits_of_rows(tables: RowTables, pattern: int, tile: tuple[int, int], num_tokens: int) -> torch.Tensor:
    """Return how often each (query, key) of a document is computed and not masked away, as the kernels do."""
    queries, keys = tile
    visits = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    per_group = keys // tables.key_unit
    for _, _, length, index in row_work(whole_rows(1, num_tokens), queries).tolist():
        line = pattern * tables.num_tiles + index
        own = tokens_of(index, queries, length)
        for entries, is_full in ((tables.full, True), (tables.masked, False)):
            first, last = entries.starts[line : line + 2].tolist()
            for units, bits in groups_of(entries, first, last, per_group):
                for unit, word in zip(units, bits, strict=True):
                    read = torch.arange(unit * tables.key_unit, (unit + 1) * tables.key_unit)
                    if is_full:  # neither the end of the document nor the triangle is looked at
                        visits[own[:, None], read] += 1
                        continue
                    read = read[read < length]
                    sees = (word >> (own % queries // tables.row_unit)) & 1
                    visits[own[:, None], read] += sees[:, None] * (own[:, None] >= read)
    return visits


def visits_of_keys(
    tables: KeyTables, work: KeyWork, pattern: int, tile: tuple[int, int]
) -> tuple[torch.Tensor, list[tuple[list[int], int]]]:
    """Return the visits of a (query, key) as ``visits_of_rows``, and each item's own keys and slot."""
    queries, keys = tile
    num_tokens = int(work.items[:, 2].max())
    visits = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    owned: list[tuple[list[int], int]] = []
    per_tile, per_group = keys // tables.key_unit, queries // tables.query_unit
    first_item, last_item = work.item_starts[pattern : pattern + 2].tolist()
    for item in work.items[first_item:last_item].tolist():
        _, _, length, line, full_first, full_last, masked_first, masked_last, slot = item
        own_units = tables.key_units[line * per_tile : (line + 1) * per_tile].tolist()
        owned.append((torch.cat([tokens_of(u, tables.key_unit, length) for u in own_units]).tolist(), slot))
        for entries, first, last in (
            (tables.full, full_first, full_last),
            (tables.masked, masked_first, masked_last),
        ):
            for units, bits in groups_of(entries, first, last, per_group):
                for unit, word in zip(units, bits, strict=True):
                    read = tokens_of(unit, tables.query_unit, length)
                    for place, own_unit in enumerate(own_units):
                        own = tokens_of(own_unit, tables.key_unit, length)
                        if (word >> place) & 1:
                            is_after = (read[:, None] >= own) | (entries is tables.full)
                            visits[read[:, None], own] += is_after
    return visits, owned


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("mode", SPARSE)
def test_tiles_of_queries_visit_every_pair_of_the_layout_once_and_no_other(
    mode: str, block: int, shape: tuple[int, int]
):
    layout = layout_of(mode, block)
    tables = row_tables(layout, queries=shape[0], keys=shape[1])
    for num_tokens in LENGTHS:
        wanted = token_table(layout, 4, num_tokens).long()
        for head in {pattern: head for head, pattern in enumerate(layout.head_patterns)}.values():
            found = visits_of_rows(tables, layout.head_patterns[head], shape, num_tokens)
            assert torch.equal(found, wanted[head]), num_tokens


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("mode", SPARSE)
def test_tiles_of_keys_are_visited_by_every_pair_of_the_layout_once_and_no_other(
    mode: str, block: int, shape: tuple[int, int]
):
    layout = layout_of(mode, block)
    tables = key_tables(layout, queries=shape[0], keys=shape[1])
    for num_tokens in LENGTHS:
        wanted = token_table(layout, 4, num_tokens).long()
        work = key_work(whole_rows(1, num_tokens), tables, keys=shape[1], num_heads_each=1, chunk=2)
        for head in {pattern: head for head, pattern in enumerate(layout.head_patterns)}.values():
            found, owned = visits_of_keys(tables, work, layout.head_patterns[head], shape)
            assert torch.equal(found, wanted[head]), num_tokens
            whole = [token for keys, slot in owned if slot == -1 for token in keys]
            split = {tuple(keys) for keys, slot in owned if slot >= 0}
            keys = sorted([*whole, *(token for one in split for token in one)])
            assert keys == list(range(num_tokens)), "every key is written by one item or one sum"


@pytest.mark.parametrize("block", [4, 12, 48, 80, 192])
def test_blocks_that_share_little_with_a_tile_are_cut_into_units(block: int):
    layout = layout_of("bigbird", block, num_heads=2)
    assert supports(layout)
    shape = (128, 64)
    rows = row_tables(layout, queries=shape[0], keys=shape[1])
    keys = key_tables(layout, queries=shape[0], keys=shape[1])
    assert rows.row_unit == math.gcd(block, 128)
    assert keys.key_unit == math.gcd(block, 64)
    work = key_work(whole_rows(1, 333 // block * block), keys, keys=64, num_heads_each=1)
    num_tokens = int(work.items[0, 2])
    wanted = token_table(layout, 2, num_tokens).long()
    for head, pattern in enumerate(layout.head_patterns):
        assert torch.equal(visits_of_rows(rows, pattern, shape, num_tokens), wanted[head])
        assert torch.equal(visits_of_keys(keys, work, pattern, shape)[0], wanted[head])


@pytest.mark.parametrize("mode", SPARSE)
def test_transposed_intervals_are_the_transposed_table(mode: str):
    for pattern in layout_of(mode, 16).patterns:
        assert torch.equal(transpose(pattern).to_dense(), pattern.to_dense().T)


def test_the_slots_of_a_sum_are_those_of_its_tile_and_no_other():
    layout = layout_of("bslongformer", 16)
    tables = key_tables(layout, queries=32, keys=32)
    positions = torch.cat([torch.arange(333), torch.arange(100), torch.arange(200)])[None]
    work = key_work(find_documents(positions, 1), tables, keys=32, num_heads_each=1, chunk=2)
    items, sums = work.items.tolist(), work.sums.tolist()
    slots = {tuple(item[:4]): set() for item in items}
    for item in items:
        if item[8] >= 0:
            slots[tuple(item[:4])].add(item[8])
    assert len(sums) > 3, "nothing was cut: this test would show nothing"
    for *tile, first, last in sums:
        assert slots.pop(tuple(tile)) == set(range(first, last))
    assert not any(slots.values()), "a chunk that no sum reads"
    written = [item[8] for item in items if item[8] >= 0]
    assert sorted(written) == list(range(work.max_slots))


@pytest.mark.parametrize("num_heads_each", [1, 4])
def test_a_global_column_is_cut_within_a_quarter_of_the_bytes_of_its_gradient(num_heads_each: int):
    num_tokens = 16384
    options = {"mode": "bslongformer", "block": 64, "global_block_indices": [0]}
    layout = build_layout(parse_sparsity(options), num_heads=1, num_blocks=num_tokens // 64, seed=0)
    tables = key_tables(layout, queries=64, keys=64)
    work = key_work(whole_rows(1, num_tokens), tables, keys=64, num_heads_each=num_heads_each)
    groups = work.items[:, 5] - work.items[:, 4] + work.items[:, 7] - work.items[:, 6]
    assert work.max_sums == 1
    assert groups.max() * num_heads_each <= 32, "one program would run long after the others"
    assert torch.equal(groups, groups.sort(descending=True).values), "heavy items come first"
    partial_bytes = work.max_slots * 64 * 128 * 2 * 4  # fp32 dk and dv of 64 keys, 128 wide
    assert partial_bytes <= num_tokens * 128 * 2 * 2 / 4


def test_many_global_columns_are_cut_less_rather_than_take_more_memory():
    num_tokens = 8192
    options = {"mode": "fixed", "block": 64, "num_local_blocks": 4}
    layout = build_layout(parse_sparsity(options), num_heads=1, num_blocks=num_tokens // 64, seed=0)
    tables = key_tables(layout, queries=64, keys=64)
    work = key_work(whole_rows(1, num_tokens), tables, keys=64, num_heads_each=4)
    assert work.max_slots <= num_tokens / (8 * 64)


def test_tables_grow_with_the_active_blocks_and_not_with_the_square_of_the_length():
    def num_bytes(num_blocks: int) -> int:
        options = {"mode": "local_sliding_window", "block": 16, "num_sliding_window_blocks": 9}
        layout = build_layout(parse_sparsity(options), num_heads=1, num_blocks=num_blocks, seed=0)
        rows, keys = row_tables(layout, queries=128, keys=64), key_tables(layout, queries=64, keys=64)
        tensors = [*rows.full, *rows.masked, keys.key_units, *keys.full, *keys.masked]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    assert num_bytes(4096) < 2.1 * num_bytes(2048)


# Useful over computed pairs at 16K tokens, counted apart from this code by collapsing the dense layout:
# queries in tiles of 128 and of 64 against 64 keys, keys in tiles of 64 against 64 queries.
COUNTED = {
    "b16 L4": (16, 4, 0.95, 0.97, 0.95),
    "b16 L16": (16, 16, 0.88, 0.92, 0.86),
    "b32 L8": (32, 8, 0.93, 0.96, 0.94),
    "b64 L32": (64, 32, 0.95, 0.98, 0.98),
}


@pytest.mark.parametrize("case", COUNTED)
def test_packing_wastes_as_little_as_was_counted(case: str):
    block, local, wide, narrow, keys = COUNTED[case]
    options = {"mode": "fixed", "block": block, "num_local_blocks": local}
    layout = build_layout(parse_sparsity(options), num_heads=2, num_blocks=16384 // block, seed=0)
    tiles = Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
    found = TiledLayout(layout).utilisation(16384, tiles)
    assert found == pytest.approx((wide, narrow, keys), abs=0.006)


def test_a_document_far_shorter_than_the_layout_gets_tables_of_its_own_size():
    options = {"mode": "local_sliding_window", "block": 16}
    layout = build_layout(parse_sparsity(options), num_heads=1, num_blocks=4096, seed=0)
    tables = TiledLayout(layout).rows(Tile(64, 64, 4, 2), 300)
    assert tables.num_tiles == 32 * 16 // 64  # 19 blocks, of which 32 is the next power of two


@pytest.mark.parametrize("block", [2, 37])
def test_blocks_that_no_tile_can_hold_are_refused_with_what_to_do(block: int):
    layout = layout_of("window", block)
    assert not supports(layout)
    with pytest.raises(ConfigError, match=f"cannot tile blocks of {block} tokens; use a multiple of 16"):
        TiledLayout(layout)
