"""Whole runs on a tiny model: the stages agree, accumulation does not matter, a resumed run is the same
run."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_runs import losses
from training.conftest import REMOVED

from sparse_llama.errors import CheckpointError, ConfigError

Train = Callable[..., Path]
BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_every_stage_follows_the_loss_curve_of_stage_0_in_fp32(train: Train, plain_run: Train, stage: int):
    steps = {"sparse_llama": {"training": {"steps": 20}}}
    reference = losses(plain_run(**steps))
    curve = losses(train("other", zero_optimization={"stage": stage}, **steps))
    assert len(curve) == 20
    assert curve == pytest.approx(reference, rel=1e-5)
    assert curve[-1] < 0.9 * curve[0]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_every_stage_follows_the_loss_curve_of_stage_0_in_bf16(train: Train, plain_run: Train, stage: int):
    steps = {"sparse_llama": {"training": {"steps": 10}}}
    reference = losses(plain_run(**BF16, **steps))
    curve = losses(train("other", zero_optimization={"stage": stage}, **BF16, **steps))
    assert curve == pytest.approx(reference, rel=5e-3)


def test_offloading_follows_the_same_curve(train: Train, plain_run: Train):
    reference = losses(plain_run())
    for stage in (2, 3):
        curve = losses(train(f"offload_{stage}", flags={"zero_stage": stage, "offload": "cpu"}))
        assert curve == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_accumulated_unequal_micro_batches_equal_one_big_batch(train: Train, packing: bool):
    """T10: every labelled token of the global batch weighs the same, however it is cut."""
    data = {"sparse_llama": {"data": {"packing": packing}, "training": {"steps": 3}}}
    big = losses(train("big", train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=1, **data))
    cut = losses(train("cut", train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=4, **data))
    assert cut == pytest.approx(big, rel=1e-5)


def test_checkpointed_activations_change_no_loss(train: Train, plain_run: Train):
    plain = losses(plain_run())
    assert losses(train("checkpointed", activation_checkpointing={})) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(("stage", "precision"), [(2, BF16), (3, {})])
def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(train: Train, stage: int, precision: dict):
    zero = {"zero_optimization": {"stage": stage}}
    whole = train("whole", sparse_llama={"training": {"steps": 6, "save_every": 3}}, **zero, **precision)
    # the schedule must be the long run's: a killed run, not a shorter one
    assert (whole / "checkpoints" / "step_000003" / "state.json").exists()
    metrics = losses(whole)
    validations = (whole / "validation.jsonl").read_text(encoding="utf-8")
    tensors = load_file(whole / "adapter" / "adapter.safetensors")
    resumed = train(
        "whole",
        flags={"resume": whole / "checkpoints" / "step_000003"},
        sparse_llama={"training": {"steps": 6, "save_every": 3}},
        **zero,
        **precision,
    )
    assert losses(resumed) == metrics
    assert (resumed / "validation.jsonl").read_text(encoding="utf-8") == validations
    again = load_file(resumed / "adapter" / "adapter.safetensors")
    assert all(tensors[name].equal(again[name]) for name in tensors)


def test_a_checkpoint_of_one_stage_continues_at_another(train: Train, plain_run: Train):
    training = {"sparse_llama": {"training": {"save_every": 3}}}
    whole = plain_run(**training)
    flags = {"resume": whole / "checkpoints" / "step_000003", "zero_stage": 3}
    assert losses(train("rest", flags, **training)) == pytest.approx(losses(whole)[3:], rel=1e-5)


def test_every_trainable_tensor_moves_in_bf16(train: Train):
    """T6: at this learning rate bf16 cannot hold a step from 1; the fp32 masters can."""
    slow = {
        "optimizer": {"params": {"lr": 1e-4}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1, "total_num_steps": REMOVED}},
    }
    slow["sparse_llama"] = {"training": {"steps": 6, "save_every": 1, "keep_last": 6}}
    run = train("run", **BF16, **slow)
    early, late = (
        load_file(run / "checkpoints" / f"step_00000{step}" / "adapter.safetensors") for step in (1, 6)
    )
    assert all(not early[name].equal(late[name]) for name in early)


def test_the_summary_holds_what_others_script_against(train: Train):
    looks = {"samples": 1, "max_new_tokens": 4, "exact_match_records": 4, "eval_every": 2}
    output_dir = train("run", sparse_llama={"training": looks})
    summary = json.loads((output_dir / "summary.json").read_text(encoding="utf-8"))
    for key in [
        "trainable_parameters",
        "train_loss",
        "validation_loss_before",
        "validation_loss",
        "exact_match_before",
        "exact_match",
        "steps",
        "tokens",
        "tokens_per_s",
        "elapsed_s",
        "peak_memory_bytes",
        "device",
        "versions",
        "density",
    ]:
        assert summary[key] is not None, key
    assert summary["steps"] == 6
    assert math.isclose(summary["train_loss"], sum(losses(output_dir)) / 6, rel_tol=0.05)
    assert 0 < summary["density"] <= 0.5
    assert set(summary["exact_match"]["by_category"]) == {"closed_book", "closed_qa"}
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert json.loads(lines[0])["lr"] > 0
    lines = (output_dir / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    first, *_, last = [json.loads(line) for line in lines]
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4, 6]
    assert first["loss"] == summary["validation_loss_before"]
    assert last["loss"] == summary["validation_loss"]
    assert last["exact_match"] == summary["exact_match"]
    record = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    assert record["versions"]["torch"]
    assert (output_dir / "adapter" / "adapter_config.json").exists()


def test_monitors_receive_a_scalar_per_step(train: Train):
    monitors = {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True}}
    output_dir = train("run", sparse_llama={"training": {"steps": 3}}, **monitors)
    assert list(output_dir.rglob("events.*"))
    csv = next(path for path in output_dir.rglob("*.csv") if "train_loss" in path.name)
    assert len(csv.read_text(encoding="utf-8").splitlines()) == 1 + 3


def test_an_optimizer_that_needs_a_gpu_is_refused_on_the_cpu(train: Train):
    """DeepSpeed itself ends in a ValueError of its op builder."""
    with pytest.raises(
        ConfigError, match=r"Lion needs a GPU, or to be offloaded; use AdamW, or ZeRO stage 1 to 3"
    ):
        train("run", optimizer={"type": "Lion", "params": {"lr": 1e-3}})


def test_the_same_tensors_are_saved_to_the_same_bytes_at_every_stage(train: Train, plain_run: Train):
    """What is exported is a function of these two files alone."""
    written = plain_run()
    for stage in (1, 2, 3):
        flags = {"resume": written / "checkpoints" / "step_000006", "zero_stage": stage}
        again = train(f"stage_{stage}", flags=flags)
        for name in ("adapter.safetensors", "adapter_config.json"):
            assert (again / "adapter" / name).read_bytes() == (written / "adapter" / name).read_bytes(), stage


def test_a_checkpoint_beyond_the_run_is_refused(train: Train, plain_run: Train, tmp_path: Path):
    shutil.copytree(plain_run(), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"step_000006: stands at step 6, beyond the 3 of this run"):
        train("run", flags={"resume": "auto"}, sparse_llama={"training": {"steps": 3}})
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_layout_that_hides_nothing_from_any_document_is_said(
    train: Train, capsys: pytest.CaptureFixture[str]
):
    """The density is that of a whole row; packed documents are shorter, and may all be causal under it."""
    training = {"steps": 3}
    train("sparse", sparse_llama={"training": training})
    assert "no document is longer than" not in capsys.readouterr().out
    wide = {"mode": "fixed", "num_local_blocks": 24}
    wide |= {"num_sliding_window_blocks": REMOVED, "global_block_indices": REMOVED}
    train("wide", sparse_llama={"training": training, "seq_length": 512}, sparse_attention=wide)
    assert "fully causal: the numbers are those of dense attention" in " ".join(
        capsys.readouterr().out.split()
    )
