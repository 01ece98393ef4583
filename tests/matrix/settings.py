"""The settings whose combinations are compared: which there are, which exist together, and which are run."""

import random
from collections import Counter
from itertools import combinations, cycle, islice, product
from typing import Any

Cell = dict[str, Any]
"""A value of every factor."""
Choice = tuple[str, Any]
"""A factor and one of its values."""

FACTORS: dict[str, tuple[Any, ...]] = {
    "adapter": ("v1", "v2", "v2 on top"),
    "attention": ("dense", "sparse"),
    "checkpoints": ("none", "every", "nested"),
    "inputs": ("device", "host", "drive"),
    "loss_tile": (None, 7),
    "mlp_tile": (None, 20),
    "norm_tile": (None, 36),
    "head_groups": (None, 2),
    "stage": (0, 1, 2, 3),
    "offload": ("none", "optimizer", "weights"),
    "ranks": (1, 2),
    "sharing": (1, 2),
}
"""The first value of each is the plain run's. ``inputs`` is where those of checkpointed layers wait,
``offload`` what ZeRO keeps on the host, ``sharing`` how many ranks have each row together."""
NUM_CANDIDATES = 30
"""More take longer and find no fewer cells."""
TILES = ("loss_tile", "mlp_tile", "norm_tile")


def is_excluded(one: Choice, other: Choice) -> bool:
    """Return whether two choices do not exist together.

    No input is kept, and so none moved, where no layer is checkpointed; ZeRO offloads the optimizer from
    stage 1 on and weights at stage 3; a rank alone shares its rows with nobody.
    """
    chosen = dict([one, other])
    stage, offload = chosen.get("stage"), chosen.get("offload")
    return (
        (chosen.get("checkpoints") == "none" and chosen.get("inputs") in ("host", "drive"))
        or (offload == "optimizer" and stage == 0)
        or (offload == "weights" and stage in (0, 1, 2))
        or (chosen.get("ranks") == 1 and chosen.get("sharing") == 2)
    )


def exists(cell: Cell) -> bool:
    """Return whether all choices of a cell exist together."""
    return not any(is_excluded(one, other) for one, other in combinations(cell.items(), 2))


def all_pairs() -> list[frozenset[Choice]]:
    """Return every pair of choices that exists, in the order of the factors."""
    return [
        frozenset([(first, one), (second, other)])
        for first, second in combinations(FACTORS, 2)
        for one, other in product(FACTORS[first], FACTORS[second])
        if not is_excluded((first, one), (second, other))
    ]


def pairs_of(cell: Cell) -> set[frozenset[Choice]]:
    """Return the pairs that a cell covers."""
    return {frozenset(pair) for pair in combinations(cell.items(), 2)}


def covering_cells() -> list[Cell]:
    """Return a few cells, always the same, that cover every pair which exists.

    Greedy, as AETG (Cohen et al., IEEE TSE 23(7), 1997) but without its random numbers: of the cells that
    start from a pair not covered yet, and take for one factor after the other the value that covers most,
    the one that covers most of all. No factor runs out of values on the way, since what excludes a choice is
    one other choice, never two together. Of equals the value that is in fewer cells.
    """
    open_pairs = dict.fromkeys(all_pairs())
    cells: list[Cell] = []
    while open_pairs:
        used = Counter(choice for cell in cells for choice in cell.items())
        candidates = (_complete(dict(pair), open_pairs, used) for pair in islice(open_pairs, NUM_CANDIDATES))
        best = max(candidates, key=lambda cell: len(pairs_of(cell) & open_pairs.keys()))
        cells.append(best)
        for pair in pairs_of(best):
            open_pairs.pop(pair, None)
    return cells


def _complete(cell: Cell, open_pairs: dict[frozenset[Choice], None], used: Counter[Choice]) -> Cell:
    for factor, values in FACTORS.items():
        if factor in cell:
            continue
        allowed = [
            value for value in values if not any(is_excluded((factor, value), one) for one in cell.items())
        ]

        def gain(value: Any, factor: str = factor) -> tuple[int, int]:
            covered = sum(frozenset([(factor, value), one]) in open_pairs for one in cell.items())
            return covered, -used[factor, value]

        cell[factor] = max(allowed, key=gain)
    return {factor: cell[factor] for factor in FACTORS}


def full_product(stage: int, ranks: int) -> list[Cell]:
    """Return the cells of a job: every adapter with every way to checkpoint, with and without tiles and head
    groups. Each draws one of the ways to attend, to offload and to share rows, all of them equally often and
    always the same: the product of these too would be six times as many.
    """
    factors = {"stage": (stage,), "ranks": (ranks,)}
    levers = _product({name: FACTORS[name] for name in ("adapter", "checkpoints", "inputs", "head_groups")})
    tiles = [dict.fromkeys(TILES), {name: FACTORS[name][1] for name in TILES}]
    others = _product(factors | {name: FACTORS[name] for name in ("attention", "offload", "sharing")})
    cells = [one | tiled for one in levers for tiled in tiles]
    drawn = list(islice(cycle(others), len(cells)))
    random.Random(10 * stage + ranks).shuffle(drawn)
    return [{**cell, **other} for cell, other in zip(cells, drawn, strict=True)]


def _product(factors: dict[str, tuple[Any, ...]]) -> list[Cell]:
    """Return the cells of some factors only."""
    cells = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return [cell for cell in cells if exists(cell)]


def name_of(cell: Cell) -> str:
    """Return what a cell has that the plain run has not."""
    first = ("adapter", "attention", "stage", "ranks")
    named = [f"{cell['adapter']}, {cell['attention']}, stage {cell['stage']} of {cell['ranks']}"]
    named += [
        f"{factor} {value}"
        for factor, value in cell.items()
        if factor not in first and value != FACTORS[factor][0]
    ]
    return ", ".join(named)
