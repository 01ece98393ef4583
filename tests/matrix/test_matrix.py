"""Every lever with every other: the gradients of a run under the launcher are plain torch's, whatever saves
memory in it.

The default cells cover every pair of settings, with one start of the launcher per number of ranks; the full
product has one per ZeRO stage and number of ranks.
"""

import json
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix.plain import ADAPTERS, BASE, SPARSITIES, plain_step
from matrix.settings import FACTORS, Cell, all_pairs, covering_cells, full_product, name_of, pairs_of
from rank_processes import launch

SCRIPT = Path(__file__).with_name("cells.py")
CELLS = sorted(covering_cells(), key=lambda cell: (cell["ranks"], cell["stage"]))
"""Stage 3 last: it replaces torch's linear function for good."""
BOUND = 1e-5
"""Relative, of each tensor's gradient. DeepSpeed keeps masters and sums gradients in fp32, so the runs
compute in fp32 (6e-8 a rounding) and are compared with fp64."""


@pytest.fixture(scope="module")
def folder(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, and the plain step of every adapter and attention."""
    folder = tmp_path_factory.mktemp("matrix")
    tiny_llama(**BASE).save_pretrained(folder / "base")
    for adapter, attention in product(ADAPTERS, SPARSITIES):
        torch.save(plain_step(folder / "base", adapter, attention), folder / f"{adapter} {attention}.pt")
    return folder


def run_job(folder: Path, job: str, cells: list[Cell], *, timeout_s: int) -> list[list[dict[str, Any]]]:
    """Return what every rank found, for each of ``cells``."""
    (num_ranks,) = {cell["ranks"] for cell in cells}
    (folder / f"{job}.json").write_text(json.dumps(cells), encoding="utf-8")
    launch(SCRIPT, num_ranks, str(folder), job, timeout_s=timeout_s)
    by_rank = [
        [json.loads(line) for line in (folder / f"{job}_{rank}.jsonl").read_text().splitlines()]
        for rank in range(num_ranks)
    ]
    for results in by_rank:
        assert [one["cell"] for one in results] == cells
    return [list(found) for found in zip(*by_rank, strict=True)]


def failures(results: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong with a cell, by rank and step."""
    found = []
    for rank, result in enumerate(results):
        if result["notices"]:
            found.append(f"a setting has no effect: {result['notices']}")
        for number, step in enumerate(result["steps"], start=1):
            where = f"{name_of(result['cell'])}: rank {rank}, step {number}"
            if not step["is_complete"]:
                found.append(f"{where}: tokens are missing")
            if step["missing"]:
                found.append(f"{where}: no gradient of {step['missing']}")
            if not step["loss_error"] < 1e-6:
                found.append(f"{where}: the loss is {step['loss_error']:.1e} off")
            if not step["error"] < BOUND:
                found.append(f"{where}: the gradient of {step['worst']} is {step['error']:.1e} off")
    return found


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What the ranks found, by the name of the cell."""
    found = []
    for num_ranks in FACTORS["ranks"]:
        cells = [cell for cell in CELLS if cell["ranks"] == num_ranks]
        found += run_job(folder, f"{num_ranks} ranks", cells, timeout_s=600)
    return {name_of(one[0]["cell"]): one for one in found}


def test_the_cells_cover_every_pair_of_settings_that_exists():
    """And seven pairs do not: those that a run refuses or says are without effect."""
    excluded = {
        frozenset([(one, value), (other, another)])
        for one, other in combinations(FACTORS, 2)
        for value, another in product(FACTORS[one], FACTORS[other])
    } - set(all_pairs())
    assert excluded == {
        frozenset(pair.items())
        for pair in (
            {"checkpoints": "none", "inputs": "host"},
            {"checkpoints": "none", "inputs": "drive"},
            {"stage": 0, "offload": "optimizer"},
            {"stage": 0, "offload": "weights"},
            {"stage": 1, "offload": "weights"},
            {"stage": 2, "offload": "weights"},
            {"ranks": 1, "sharing": 2},
        )
    }
    assert set().union(*map(pairs_of, CELLS)) == set(all_pairs())
    assert len(CELLS) <= 24, "a few, or they are no quick test"


@pytest.mark.parametrize("name", map(name_of, CELLS))
def test_gradients_are_plain_torchs(results: dict[str, list[dict[str, Any]]], name: str):
    assert failures(results[name]) == []


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "stage"), list(product(FACTORS["ranks"], FACTORS["stage"])))
def test_gradients_of_the_full_product_are_plain_torchs(folder: Path, num_ranks: int, stage: int):
    cells = full_product(stage, num_ranks)
    found = run_job(folder, f"stage {stage} of {num_ranks}", cells, timeout_s=7200)
    assert [line for results in found for line in failures(results)] == []
