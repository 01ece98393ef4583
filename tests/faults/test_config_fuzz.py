"""Seeded mutations of every shipped document: each is a run that could start, or is refused in one line."""

import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_table import FaultsRecord
from json_mutations import damaged, mutated, without_comments
from shipped_documents import DOCUMENTS, FOLDER, processes_of

from sparse_llama.config.run import Overrides, Run, load_run
from sparse_llama.config.schedule import learning_rate
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import build_layout

FEW = 15
"""Mutations of a document in every run of the tests; with ``-m faults`` there are ``MANY``."""
MANY = 2000
AMOUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.faults)]
MOST_CHARACTERS, MOST_SECONDS = 600, 2.0
NUM_HEADS, NUM_LAYERS, MOST_BLOCKS = 4, 8, 128
STUDIES = sorted((FOLDER / "studies").glob("*.json"))
FLAGS: list[dict[str, Any]] = [
    {}, {}, {"zero_stage": 3, "offload": "cpu"}, {"steps": 3}, {"epochs": 1, "lr": 1e-4}, {"attention": "dense"},
    {"seq_length": 64, "seed": 5}, {"adapter": "v1", "model": "a/b", "dataset": "c/d"}, {"zero_stage": 1},
    {"micro_batch_size": 1, "checkpointing": "cpu", "loss_tile": 0}, {"rope": "linear", "attention": "sparse"},
]  # fmt: skip


def refusal(action: Callable[[], object], file: Path) -> str | None:
    """Return the line that refuses ``file``; None if it is accepted."""
    begun = time.perf_counter()
    try:
        action()
        line = None
    except ConfigError as error:
        line = str(error)
        assert line.startswith(f"{file}: ") or line.startswith("--"), line
        said = line.removeprefix(f"{file}: ")
        assert said.isascii(), said
        assert said.isprintable(), said
        assert 0 < len(said) < MOST_CHARACTERS, said
    assert time.perf_counter() - begun < MOST_SECONDS
    return line


def assert_starts(run: Run) -> None:
    """Check what of a run can be checked without a model: what it saves, its layouts and its schedule."""
    text = json.dumps(run.to_json(), allow_nan=False)
    assert json.loads(text) == run.to_json()
    assert_layouts(run)
    if run.schedule is not None:
        assert_rates(run)


def assert_layouts(run: Run) -> None:
    length = run.settings.attention.master_length
    assert length is not None
    try:
        found = run.layouts.resolve(NUM_LAYERS)
    except ConfigError:  # names layers that this model has not, which it is told once it is known
        return
    for sparsity in set(found) - {None}:
        num_blocks = min(-(-length // sparsity.block), MOST_BLOCKS)
        if sparsity.num_blocks_needed()[1] <= num_blocks:
            assert 0 < build_layout(sparsity, NUM_HEADS, num_blocks).density <= 1


def assert_rates(run: Run) -> None:
    schedule = run.schedule
    assert schedule is not None
    steps = run.settings.training.steps or 20
    try:
        schedule = schedule.resolve(steps)
    except ConfigError:  # the warm-up is longer than these steps, which is known once the data are
        return
    rates = [learning_rate(schedule, step) for step in {*range(1, min(steps, 50) + 1), steps // 2 + 1, steps}]
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates), rates


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_a_changed_document_is_a_run_or_refused_in_one_line(
    document: Path, amount: int, tmp_path: Path, faults_record: FaultsRecord
):
    """On every rank of every number of them: each reads the document for itself."""
    rng = random.Random(20)
    plain, file = without_comments(document), tmp_path / "mine.json"
    num_refused = 0
    for number in range(amount):
        file.write_text(mutated(plain, rng), encoding="utf-8", errors="surrogatepass")
        flags = Overrides(output_dir=tmp_path / "out", **rng.choice(FLAGS))
        ranks = rng.choice((processes_of(document), processes_of(document), 1, 2, 8))
        is_main = number % 2 == 0
        runs: list[Run] = []
        line = refusal(
            lambda: runs.append(load_run(file, flags, ranks, is_main=is_main, is_here=False)),  # noqa: B023
            file,
        )
        num_refused += line is not None
        for run in runs:
            assert_starts(run)
    assert 0 < num_refused < amount
    faults_record("configuration changed", injected=amount, survived=amount)
