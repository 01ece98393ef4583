"""Twenty steps are seven steps, a kill, and thirteen, to the bit; at another stage, or on another number of
ranks, the curve goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fault_table import FaultsRecord
from faults.nursery import Nursery
from faults.training_jobs import Jobs
from small_runs import losses
from training.conftest import REMOVED

pytestmark = pytest.mark.faults


def settings(**changes: Any) -> dict[str, Any]:
    training = {"steps": 20, "samples": 0, "save_every": 7, "eval_every": 7, "keep_last": 9}
    return {"sparse_llama": {"training": training} | changes.pop("sparse_llama", {})} | changes


CELLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{f"stage {stage}": (settings(), ["--zero_stage", str(stage)]) for stage in range(4)},
    **{
        f"stage {stage}, bf16": (settings(bf16={"enabled": True}), ["--zero_stage", str(stage)])
        for stage in range(4)
    },
    **{
        f"stage {stage}, offloaded": (settings(), ["--zero_stage", str(stage), "--offload", "cpu"])
        for stage in (1, 2, 3)
    },
    "accumulation": (
        settings(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=4),
        ["--zero_stage", "2"],
    ),
    "no packing": (settings(sparse_llama={"data": {"validation_records": 12, "packing": False}}), []),
    "grouped by length": (
        settings(
            sparse_llama={"data": {"validation_records": 12, "packing": False, "group_by_length": True}}
        ),
        [],
    ),
    "checkpointed activations": (settings(activation_checkpointing={}), ["--head_groups", "2"]),
    "version 1": (settings(sparse_llama={"adapter": {"version": "v1", "prompt_length": 4}}), []),
    "a scheduler of DeepSpeed's own": (
        settings(
            scheduler={
                "type": "OneCycle",
                "params": {
                    "warmup_num_steps": REMOVED,
                    "total_num_steps": REMOVED,
                    "cycle_min_lr": 1e-3,
                    "cycle_max_lr": 1e-2,
                    "cycle_first_step_size": 9,
                },
            }
        ),
        [],
    ),
}
TWO_RANKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    f"stage {stage}": (settings(gradient_accumulation_steps=1), ["--zero_stage", str(stage)])
    for stage in range(4)
} | {
    "shared rows": (settings(gradient_accumulation_steps=2, sequence_parallel_size=2), ["--zero_stage", "2"])
}


def stopped_and_resumed(
    nursery: Nursery, workplace: Path, folder: Path, changes: dict[str, Any], words: list[str], ranks: int
) -> tuple[Jobs, Jobs]:
    """Return a run in one go, and one that was killed in step 8, where step 7 was saved."""
    whole = Jobs(nursery, workplace, folder / "whole", changes, *words, ranks=ranks)
    assert whole.run() == [0] * ranks, whole.log.read_text(encoding="utf-8")[-3000:]
    broken = Jobs(nursery, workplace, folder / "broken", changes, *words, ranks=ranks)
    assert broken.run(kill_at_step=8)[0] == -9
    assert broken.newest_step() == 7
    assert broken.run() == [0] * ranks, broken.log.read_text(encoding="utf-8")[-3000:]
    return whole, broken


@pytest.mark.parametrize("cell", CELLS)
def test_a_killed_run_goes_on_to_the_bit(
    cell: str, nursery: Nursery, workplace: Path, tmp_path: Path, faults_record: FaultsRecord
):
    """Of 19 steps an epoch: step 8 is in the middle of one, step 20 in the next."""
    whole, broken = stopped_and_resumed(nursery, workplace, tmp_path, *CELLS[cell], ranks=1)
    is_same = whole.result() == broken.result()
    faults_record("kill -9, exact resume", injected=1, survived=int(is_same))
    assert is_same


@pytest.mark.parametrize("cell", TWO_RANKS)
def test_two_ranks_go_on_to_the_bit(
    cell: str, nursery: Nursery, workplace: Path, tmp_path: Path, faults_record: FaultsRecord
):
    whole, broken = stopped_and_resumed(nursery, workplace, tmp_path, *TWO_RANKS[cell], ranks=2)
    is_same = whole.result() == broken.result()
    faults_record("kill -9, exact resume on two ranks", injected=1, survived=int(is_same))
    assert is_same


def test_any_stage_and_number_of_ranks_goes_on_from_any_other(
    nursery: Nursery, workplace: Path, tmp_path: Path, faults_record: FaultsRecord
):
    """A checkpoint is whole tensors: it knows of no stage."""
    one, two = settings(gradient_accumulation_steps=2), settings(gradient_accumulation_steps=1)
    whole = Jobs(nursery, workplace, tmp_path / "whole", one)
    assert whole.run() == [0]
    expected, survived = losses(whole.output_dir), 0
    hops = [(2, 0), (1, 1), (2, 3), (1, 2), (2, 2), (1, 3), (2, 1), (1, 0)]
    for number, (ranks, stage) in enumerate(hops):
        jobs = Jobs(
            nursery,
            workplace,
            tmp_path / str(number),
            one if ranks == 1 else two,
            "--zero_stage",
            str(stage),
            ranks=ranks,
        )
        before = whole.output_dir if number == 0 else tmp_path / str(number - 1) / "run"
        shutil.copytree(before / "checkpoints" / "step_000007", jobs.checkpoints / "step_000007")
        shutil.copyfile(before / "metrics.jsonl", jobs.output_dir / "metrics.jsonl")
        assert jobs.run() == [0] * ranks, jobs.log.read_text(encoding="utf-8")[-3000:]
        record = json.loads((jobs.output_dir / "run.json").read_text(encoding="utf-8"))
        assert (record["world_size"], record["deepspeed"]["zero_optimization"]["stage"]) == (ranks, stage)
        assert losses(jobs.output_dir) == pytest.approx(expected, rel=1e-5)
        survived += 1
    faults_record("resume at another stage and number of ranks", injected=len(hops), survived=survived)
