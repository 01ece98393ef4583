"""The loop over tiles of rows, and how a plan goes through it: a few tiles stand for all.

Every such loop writes its results to tensors made before it, so that a tile allocates and releases what the
one before it did. Code that runs without data, to see what is allocated, learns nothing from the hundredth.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol


class TileSample(Protocol):
    """Whoever runs few tiles for many."""

    def standing_for(self, count: int) -> AbstractContextManager[None]:
        """Within it, count what is done as done ``count`` times."""
        ...


_SAMPLE: ContextVar[TileSample | None] = ContextVar("tile_sample", default=None)


@contextmanager
def sampled_tiles(sample: TileSample) -> Iterator[None]:
    """Within it, loops run their first two tiles and their last two; the second stands for those left out."""
    token = _SAMPLE.set(sample)
    try:
        yield
    finally:
        _SAMPLE.reset(token)


def row_tiles(num_rows: int, tile: int | None) -> Iterator[slice]:
    """Yield slices of ``tile`` rows, the last one shorter; of all rows at once where ``tile`` is None."""
    step = max(num_rows, 1) if tile is None else tile
    tiles = [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
    sample = _SAMPLE.get()
    if sample is None or len(tiles) <= 4:
        yield from tiles
        return
    yield tiles[0]
    with sample.standing_for(len(tiles) - 3):
        yield tiles[1]
    yield from tiles[-2:]
