"""A plan goes through a few tiles of a loop and counts them as all; everybody else goes through all."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
from shipped_runs import find_base, run_of

from sparse_llama.attention.tile_loop import row_tiles, sampled_tiles
from sparse_llama.planning import fake_step
from sparse_llama.planning.estimate import estimate
from sparse_llama.planning.search import at_length


class Counter:
    """Adds up what is done, and how often it counts."""

    def __init__(self) -> None:
        self.times, self.rows, self.tiles = 1, 0, 0

    @contextmanager
    def standing_for(self, count: int) -> Iterator[None]:
        before, self.times = self.times, self.times * count
        try:
            yield
        finally:
            self.times = before

    def add(self, rows: slice) -> None:
        self.rows += self.times * (rows.stop - rows.start)
        self.tiles += 1


@pytest.mark.parametrize("tile", [1, 7, 10, 100, 1000, None])
@pytest.mark.parametrize("num_rows", [0, 1, 40, 41, 1000])
def test_tiles_cover_every_row_once_and_sampled_ones_count_as_many(num_rows: int, tile: int | None):
    whole = [index for rows in row_tiles(num_rows, tile) for index in range(rows.start, rows.stop)]
    assert whole == list(range(num_rows))
    counter = Counter()
    with sampled_tiles(counter):
        for rows in row_tiles(num_rows, tile):
            counter.add(rows)
    assert counter.rows == num_rows
    assert counter.tiles <= 4
    assert len(list(row_tiles(num_rows, tile))) == -(-num_rows // (tile or max(num_rows, 1)))


def test_loops_inside_of_loops_multiply():
    counter = Counter()
    with sampled_tiles(counter):
        for outer in row_tiles(100, 10):
            for inner in row_tiles(outer.stop - outer.start, 1):
                counter.add(inner)
    assert (counter.rows, counter.tiles) == (100, 16)


LEVERS = [
    {"loss_tile": 96, "mlp_tile": 64, "norm_tile": 80},
    {"loss_tile": 96, "mlp_tile": 64, "norm_tile": 80, "checkpointing": "none", "adapter": "v1"},
    {"loss_tile": 100, "mlp_tile": 64, "head_groups": 2, "checkpointing": "cpu"},
]


@pytest.mark.parametrize("flags", LEVERS, ids=["tiles", "tiles, v1, nothing checkpointed", "head groups"])
def test_a_plan_of_some_tiles_is_the_plan_of_all(flags: dict, monkeypatch: pytest.MonkeyPatch):
    """To the byte, at every place, and to the operation: a tile does what the one before it did."""
    run = at_length(run_of("cpu_demo", micro_batch_size=2, **flags), 600)
    config = find_base(run.settings.model).config
    sampled = estimate(run, config, device="cuda")
    monkeypatch.setattr(fake_step, "sampled_tiles", lambda tracker: nullcontext())
    assert estimate(run, config, device="cuda") == sampled
