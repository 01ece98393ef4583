"""Ranks that share rows train as one rank does: losses, every gradient and whole runs, under the launcher."""

import copy
import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.masked_attention import relative_error
from rank_processes import launch
from rich.console import Console
from safetensors.torch import load_file
from small_runs import losses
from training.conftest import DOCUMENT, SPARSE
from training.sequence_steps import DESCENT, write_step

from sparse_llama.config.run import Overrides, load_run
from sparse_llama.errors import ConfigError
from sparse_llama.training.loop import fit
from sparse_llama.training.session import prepare

SCRIPT = Path(__file__).with_name("sequence_steps.py")
BIGBIRD = {
    "mode": "bigbird",
    "block": 16,
    "num_random_blocks": 1,
    "num_sliding_window_blocks": 3,
    "different_layout_per_head": True,
}
TILES = {"loss_tile": 16, "mlp_tile": 48, "norm_tile": 32}


@dataclass(frozen=True)
class Cell:
    """A configuration of the small model: 4 query heads, 2 key/value heads, rows of up to 320 tokens."""

    version: str
    layout: dict[str, Any] | None = None
    packing: bool = True
    stage: int = 0
    checkpointing: dict[str, Any] | None = None
    memory: dict[str, int] | None = None
    is_bf16: bool = False

    def document(self, workplace: Path, *, sharing: int, accumulation: int = 2) -> dict[str, Any]:
        document = copy.deepcopy(DOCUMENT) | {
            "gradient_accumulation_steps": accumulation,
            "sequence_parallel_size": sharing,
            "zero_optimization": {"stage": self.stage},
            "activation_checkpointing": self.checkpointing,
            "sparse_attention": self.layout,
        }
        if self.is_bf16:
            document["bf16"] = {"enabled": True}
        if self.stage == 3:  # or all of a tiny model stays whole
            document["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        document["sparse_llama"] |= {
            "model": {"path": str(workplace / "model"), "random_weights": True},
            "data": {
                "dataset": str(workplace / "data.jsonl"),
                "validation_records": 12,
                "packing": self.packing,
            },
            "adapter": {"version": self.version, "prompt_length": 4, "start_layer": 1},
            "memory": self.memory or {},
        }
        return document


CELLS = {
    "stage 0, sparse": Cell("v2", SPARSE),
    "stage 3, v1, dense, one document a row": Cell("v1", packing=False, stage=3, checkpointing={}),
    "stage 2, a layout per head": Cell("v2", BIGBIRD, stage=2),
}
MORE_CELLS = {
    "stage 1, dense, one document a row": Cell("v2", packing=False, stage=1),
    "v1, a layout per head, checkpointed": Cell("v1", BIGBIRD, checkpointing={}),
    "stage 3, sparse, tiles, nested checkpoints on the host": Cell(
        "v2",
        SPARSE,
        stage=3,
        checkpointing={"cpu_checkpointing": True, "number_checkpoints": 2},
        memory=TILES,
    ),
}
BF16 = Cell("v2", SPARSE, stage=2, is_bf16=True)
OF_TWO = {"heads in groups": Cell("v2", BIGBIRD, memory={"head_groups": 2})}
"""Two ranks share the two query heads of a group; four have none left."""
SLOW = {(2, name): cell for name, cell in (MORE_CELLS | OF_TWO).items()} | {
    (4, name): cell for name, cell in MORE_CELLS.items()
}


@dataclass(frozen=True)
class Outcome:
    """What a job, or a process alone, left in a folder."""

    folder: Path

    @property
    def measured(self) -> list[dict[str, Any]]:
        """What every rank measured."""
        paths = sorted(self.folder.glob("measured_*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "gradients.safetensors")


def write(folder: Path, document: dict[str, Any]) -> str:
    folder.mkdir(parents=True)
    path = folder / "config.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return str(path)


def step_alone(folder: Path, cell: Cell, workplace: Path, *, accumulation: int = 2) -> Outcome:
    """Take the step in this process, at stage 0 and without anything that saves memory."""
    plain = Cell(cell.version, cell.layout, cell.packing, is_bf16=cell.is_bf16)
    document = plain.document(workplace, sharing=1, accumulation=accumulation)
    write_step(Path(write(folder, document | DESCENT)))
    return Outcome(folder)


def check_step(job: Outcome, alone: Outcome) -> None:
    """Compare a job with the process that had its rows for itself: fp32, summed in another order."""
    (expected,) = alone.measured
    for measured in job.measured:
        assert measured["labelled"] == expected["labelled"]
        for name in ("loss_sum", "validation_loss"):
            assert measured[name] == pytest.approx(expected[name], rel=1e-6), name
    wanted, found = alone.gradients, job.gradients
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert float(gradient.norm()) > 1e-3, f"{name}: next to nothing to compare"
        assert relative_error(found[name], gradient) < 1e-5, name


@pytest.fixture(scope="module")
def sharp_workplace(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data with a model whose attention is far from uniform: else the gradients of queries and keys
    are rounding errors."""
    folder = tmp_path_factory.mktemp("sharp") / "workplace"
    shutil.copytree(workplace, folder)
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"initializer_range": 0.3}), encoding="utf-8")
    return folder


def run_document(workplace: Path, *, sharing: int) -> dict[str, Any]:
    document = CELLS["stage 2, a layout per head"].document(workplace, sharing=sharing)
    document["sparse_llama"]["training"] = {
        "steps": 4,
        "save_every": 2,
        "samples": 1,
        "exact_match_records": 3,
        "max_new_tokens": 4,
    }
    return document


@pytest.fixture(scope="module")
def pair(sharp_workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes that share their rows: a step of every cell, a run, and its second half once more; one
    start of the launcher."""
    folder = tmp_path_factory.mktemp("pair")
    steps = [
        write(folder / name, cell.document(sharp_workplace, sharing=2) | DESCENT)
        for name, cell in CELLS.items()
    ]
    document = write(folder / "run", run_document(sharp_workplace, sharing=2))
    run = ["--ds_config", document, "--output_dir", str(folder / "together")]
    resumed = [*run[:2], "--resume", str(folder / "together" / "checkpoints" / "step_000002")]
    again = [*resumed, "--output_dir", str(folder / "again"), "--ignore_plan"]
    launch(SCRIPT, 2, json.dumps(steps), json.dumps([run, again]))
    return folder


@pytest.fixture(scope="module")
def alone(sharp_workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in this process, which has its rows for itself."""
    folder = tmp_path_factory.mktemp("alone")
    path = write(folder / "run", run_document(sharp_workplace, sharing=1))
    fit(load_run(Path(path), Overrides(output_dir=folder / "alone"), world_size=1))
    return folder / "alone"


@pytest.mark.parametrize("name", CELLS)
def test_a_step_of_two_ranks_is_one_ranks(pair: Path, sharp_workplace: Path, tmp_path: Path, name: str):
    check_step(Outcome(pair / name), step_alone(tmp_path / "alone", CELLS[name], sharp_workplace))


def test_the_cut_goes_through_documents_and_parts_their_labels_unevenly(pair: Path):
    """Or the steps above would compare what cannot go wrong."""
    first, second = Outcome(pair / "stage 0, sparse").measured
    assert second["begins_inside_a_document"]
    assert min(first["num_starts"], second["num_starts"]) > 0
    assert first["labelled_here"] != second["labelled_here"]
    assert sum(first["labelled_here"] + second["labelled_here"]) == first["labelled"]
    first, second = Outcome(pair / "stage 3, v1, dense, one document a row").measured
    assert 0 in first["labelled_here"]
    assert first["tokens_here"] == second["tokens_here"]


def test_a_run_of_two_ranks_is_one_ranks(pair: Path, alone: Path):
    """With validation, exact match and answers, which every rank computes on its own."""
    assert len(losses(alone)) == 4
    assert losses(pair / "together") == pytest.approx(losses(alone), rel=1e-4)
    found, expected = (
        json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        for folder in (pair / "together", alone)
    )
    for name in ("validation_loss_before", "validation_loss", "train_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    for name in ("steps", "labelled_tokens", "exact_match_before", "exact_match", "tokens"):
        assert found[name] == expected[name], name
    record = json.loads((pair / "together" / "run.json").read_text(encoding="utf-8"))
    assert record["world_size"] == 2
    assert record["deepspeed"]["sequence_parallel_size"] == 2
    assert record["deepspeed"]["train_batch_size"] == 4, "the rows of a step, as the document counts them"


def test_a_resumed_run_of_two_ranks_saves_the_same_bytes(pair: Path):
    for name in ("adapter.safetensors", "adapter_config.json"):
        saved = [(pair / run / "adapter" / name).read_bytes() for run in ("together", "again")]
        assert saved[0] == saved[1], name


def test_ranks_that_the_heads_of_the_model_cannot_be_shared_by_are_refused_before_it_loads(
    workplace: Path, tmp_path: Path
):
    document = CELLS["stage 0, sparse"].document(workplace, sharing=5)
    path = Path(write(tmp_path / "run", document))
    run = load_run(path, Overrides(output_dir=tmp_path / "out"), world_size=5)
    with pytest.raises(
        ConfigError, match="5 ranks cannot share query heads and key/value heads evenly, 4 and 2"
    ):
        prepare(run, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def jobs(sharp_workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four processes that share their rows by two and by four."""
    folder = tmp_path_factory.mktemp("jobs")
    cells = {
        "bf16": (2, BF16)
    }  # first: stage 3 replaces torch's linear for good by one that rounds otherwise
    cells |= {f"{sharing} {name}": (sharing, cell) for (sharing, name), cell in SLOW.items()}
    steps = [
        write(folder / name, cell.document(sharp_workplace, sharing=sharing) | DESCENT)
        for name, (sharing, cell) in cells.items()
    ]
    launch(SCRIPT, 4, json.dumps(steps), "[]", timeout_s=900)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("sharing", "name"), SLOW)
def test_a_step_of_four_ranks_is_one_ranks(
    jobs: Path, sharp_workplace: Path, tmp_path: Path, sharing: int, name: str
):
    """Two groups of two have twice the rows of a group of four; four share two key/value heads."""
    cell, accumulation = SLOW[sharing, name], 2 * 4 // sharing
    expected = step_alone(tmp_path / "alone", cell, sharp_workplace, accumulation=accumulation)
    check_step(Outcome(jobs / f"{sharing} {name}"), expected)


@pytest.mark.slow
def test_in_bf16_the_ranks_are_as_exact_as_one_rank(jobs: Path, sharp_workplace: Path, tmp_path: Path):
    """Gradients in bf16 differ from those in fp32 by a fifth here, whoever computes them."""

    def all_gradients(outcome: Outcome) -> torch.Tensor:
        return torch.cat([gradient.flatten() for _, gradient in sorted(outcome.gradients.items())])

    exact, rounded = (
        all_gradients(step_alone(tmp_path / str(cell.is_bf16), cell, sharp_workplace, accumulation=4))
        for cell in (replace(BF16, is_bf16=False), BF16)
    )
    job = Outcome(jobs / "bf16")
    assert relative_error(all_gradients(job), exact) < 1.1 * relative_error(rounded, exact)
    (alone,) = Outcome(tmp_path / "False").measured
    assert job.measured[0]["loss_sum"] == pytest.approx(alone["loss_sum"], rel=5e-3)
