"""What must fit together: batch sizes and processes, precisions, ZeRO and offload, lengths and layouts."""

import ctypes.util
import itertools
from pathlib import Path

import pytest

from sparse_llama.config import combinations
from sparse_llama.config.combinations import resolve_batch
from sparse_llama.errors import ConfigError

BATCH, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@pytest.fixture
def has_libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.1")


def test_the_batch_sizes_left_out_follow_from_the_others_and_the_number_of_processes():
    assert resolve_batch({MICRO: 4}, 2) == {BATCH: 8, MICRO: 4, STEPS: 1}
    assert resolve_batch({MICRO: 4, STEPS: 16}, 1) == {BATCH: 64, MICRO: 4, STEPS: 16}
    assert resolve_batch({BATCH: 64}, 8) == {BATCH: 64, MICRO: 8, STEPS: 1}
    assert resolve_batch({BATCH: 64, STEPS: 4}, 2) == {BATCH: 64, MICRO: 8, STEPS: 4}
    assert resolve_batch({BATCH: 64, MICRO: 8}, 2) == {BATCH: 64, MICRO: 8, STEPS: 4}


def test_batch_sizes_are_resolved_as_deepspeed_resolves_them():
    """For one process, which is all that DeepSpeed sees without a process group."""
    from deepspeed.runtime.config import DeepSpeedConfig

    for batch, micro, steps in itertools.product((None, 1, 6, 8, 12), (None, 1, 2, 4), (None, 1, 2, 3)):
        given = {key: value for key, value in ((BATCH, batch), (MICRO, micro), (STEPS, steps)) if value}
        try:
            theirs = vars(DeepSpeedConfig(dict(given)))
        except AssertionError:
            with pytest.raises(ConfigError):
                resolve_batch(given, 1)
        else:
            assert resolve_batch(given, 1) == {key: theirs[key] for key in (BATCH, MICRO, STEPS)}


def test_batch_sizes_that_do_not_multiply_up_name_all_factors(refusal):
    assert refusal({BATCH: 7, MICRO: 4, STEPS: 2}) == (
        "train_batch_size: 7 rows are not train_micro_batch_size_per_gpu (4) x "
        "gradient_accumulation_steps (2) x 1 process; change one of them"
    )
    assert refusal({BATCH: 9, MICRO: 4}, world_size=2) == (
        "train_batch_size: 9 rows are not train_micro_batch_size_per_gpu (4) x "
        "gradient_accumulation_steps (any) x 2 processes; change one of them"
    )
    assert refusal("{}") == (
        "train_micro_batch_size_per_gpu: missing; give it, or train_batch_size, the rows of one optimizer "
        "step"
    )


def test_processes_that_share_their_rows_count_once_as_deepspeed_counts_them():
    assert resolve_batch({MICRO: 4, "sequence_parallel_size": 4}, 8) == {BATCH: 8, MICRO: 4, STEPS: 1}
    assert resolve_batch({BATCH: 6, STEPS: 3, "sequence_parallel_size": 2}, 4) == {
        BATCH: 6,
        MICRO: 1,
        STEPS: 3,
    }
    assert resolve_batch({BATCH: 6, MICRO: 3, "sequence_parallel_size": 2}, 2) == {
        BATCH: 6,
        MICRO: 3,
        STEPS: 2,
    }


@pytest.mark.parametrize(
    ("sharing", "processes", "said"),
    [
        (2, 1, "1 process cannot make groups of 2"),
        (3, 4, "4 processes cannot make groups of 3"),
        (8, 4, "4 processes cannot make groups of 8"),
    ],
)
def test_processes_that_do_not_make_whole_groups_are_refused(
    refusal, sharing: int, processes: int, said: str
):
    allowed = {1: "1", 4: "1, 2 or 4"}[processes]
    assert refusal({MICRO: 1, "sequence_parallel_size": sharing}, world_size=processes) == (
        f"sequence_parallel_size: {said} that share their rows; start a multiple of {sharing} "
        f"(deepspeed --num_gpus {sharing} ...), or use {allowed}"
    )


def test_a_batch_that_does_not_multiply_up_names_the_groups(refusal):
    assert refusal({BATCH: 9, MICRO: 4, "sequence_parallel_size": 2}, world_size=4) == (
        "train_batch_size: 9 rows are not train_micro_batch_size_per_gpu (4) x gradient_accumulation_steps "
        "(any) x 2 groups of 2 processes (sequence_parallel_size); change one of them"
    )


def test_rows_that_ranks_cannot_share_evenly_are_refused(refusal, load):
    """To pad them would make them longer than the layout, and than the run says."""

    def document(length: int, sharing: int = 4) -> dict:
        return {"sequence_parallel_size": sharing, "sparse_llama": {"seq_length": length}}

    assert load(document(500), world_size=4).sequence_parallel_size == 4
    assert load({}).sequence_parallel_size == 1
    assert refusal(document(510), world_size=4) == (
        "sparse_llama.seq_length: 510 tokens cannot be shared by 4 ranks (sequence_parallel_size) evenly; "
        "use 508 or 512"
    )
    assert refusal(document(3), world_size=4).endswith("evenly; use 4")


def test_two_precisions_are_refused(refusal):
    on = {"enabled": True}
    assert refusal({"bf16": on, "fp16": on}) == (
        "bf16.enabled, fp16.enabled: both are true; keep one of them"
    )


def test_a_dtype_to_sum_gradients_in_is_refused_at_the_stages_that_have_none(refusal, load):
    def document(stage: int) -> dict:
        return {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "fp32"}}

    for stage in (0, 1):
        assert refusal(document(stage)) == (
            f"data_types.grad_accum_dtype: stage {stage} sums gradients in the compute precision; "
            "use zero_optimization.stage 2 or 3, or leave it out"
        )
    assert load(document(2)).zero_stage == 2


def test_offload_at_stage_0_is_refused(refusal):
    for name in ("offload_optimizer", "offload_param"):
        assert refusal({"zero_optimization": {"stage": 0, name: {"device": "cpu"}}}) == (
            f"zero_optimization.{name}: stage 0 cannot offload; use stage 1 to 3, or drop it with "
            "--offload none"
        )


@pytest.mark.usefixtures("has_libaio")
def test_the_optimizer_goes_to_nvme_at_stage_3_only(refusal, load):
    block = {"device": "nvme", "nvme_path": "/drive"}
    for stage in (1, 2):
        assert refusal({"zero_optimization": {"stage": stage, "offload_optimizer": block}}) == (
            'zero_optimization.offload_optimizer.device: "nvme" needs stage 3, '
            f'the stage is {stage}; use "cpu"'
        )
    assert load({"zero_optimization": {"stage": 3, "offload_optimizer": block}}).offload == "nvme"


@pytest.mark.usefixtures("has_libaio")
def test_nvme_without_a_folder_is_refused(refusal):
    assert refusal({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}) == (
        'zero_optimization.offload_param.nvme_path: missing; device "nvme" needs a folder on the drive, '
        "here or by --nvme_path"
    )


def test_nvme_without_libaio_is_refused_and_the_package_is_named(refusal, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: asked.append(name))
    block = {"device": "nvme", "nvme_path": "/drive"}
    assert refusal({"zero_optimization": {"stage": 3, "offload_param": block}}) == (
        'zero_optimization.offload_param.device: "nvme" needs libaio, which is not installed; '
        'install the package libaio-dev (libaio-devel on Fedora and RHEL), or use "cpu"'
    )
    assert asked == ["aio"]


def test_an_optimizer_that_deepspeed_has_not_for_the_cpu_cannot_be_offloaded(refusal):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert refusal({"zero_optimization": zero, "optimizer": {"type": "SGD"}}) == (
        "optimizer.type: SGD cannot be offloaded; use AdamW or Adam or Lion or Adagrad, or drop "
        "zero_optimization.offload_optimizer"
    )


def test_an_optimizer_not_tested_with_zero_needs_deepspeeds_own_switch(refusal, load):
    document = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "SGD"}}
    assert refusal(document) == (
        "optimizer.type: DeepSpeed has not tested SGD with ZeRO; use stage 0 or AdamW, Adam, Lion, Adagrad, "
        'or add "zero_allow_untested_optimizer": true'
    )
    assert load(document | {"zero_allow_untested_optimizer": True}).zero_stage == 1
    assert load(document | {"zero_optimization": {"stage": 0}}).zero_stage == 0


def test_the_optimizers_said_to_be_tested_with_zero_are_those_of_deepspeeds_list():
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    from sparse_llama.config.optimizer import OPTIMIZERS, ZERO_TESTED

    names = {cls.__name__ for cls in ZERO_SUPPORTED_OPTIMIZERS}
    tested = {"AdamW": "AdamW", "Adam": "Adam", "Lion": "FusedLion", "Adagrad": "Adagrad", "SGD": "SGD"}
    assert tested.keys() == OPTIMIZERS.keys()
    assert {ours for ours, theirs in tested.items() if theirs in names} == set(ZERO_TESTED)


def test_nesterov_without_momentum_is_refused(refusal):
    block = {"type": "SGD", "params": {"nesterov": True}}
    assert refusal({"optimizer": block}) == "optimizer.params.nesterov: needs momentum > 0 and dampening 0"


def test_two_lengths_of_a_run_are_refused(refusal):
    assert refusal({"sparse_llama": {"training": {"steps": 10, "epochs": 3}}}) == (
        "sparse_llama.training: steps (10) and epochs (3) are both given; keep one of them"
    )


def test_a_warm_up_as_long_as_the_run_is_refused(refusal, load):
    scheduler = {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 30}}
    document = {"scheduler": scheduler, "sparse_llama": {"training": {"steps": 30}}}
    assert refusal(document) == (
        "scheduler.params.warmup_num_steps: 30 steps of warm-up, but the run has 30; use less than 30, "
        "or leave the key out for 5%"
    )
    assert refusal(document, steps=5).startswith(
        "scheduler.params.warmup_num_steps: 30 steps of warm-up, but "
    )
    assert load(document, steps=31).schedule.warmup_steps == 30


def test_a_warm_up_that_starts_above_its_peak_is_refused(refusal):
    scheduler = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.1}}
    assert refusal({"scheduler": scheduler}) == (
        "scheduler.params.warmup_min_lr: 0.1 is above the peak, 0.001; the warm-up would fall"
    )


def test_a_master_layout_shorter_than_its_rows_is_refused(refusal):
    settings = {"seq_length": 512, "attention": {"master_length": 256}}
    assert refusal({"sparse_llama": settings}) == (
        "sparse_llama.attention.master_length: 256 tokens are fewer than seq_length, 512; "
        "use at least 512, or leave it out"
    )


def test_a_layout_that_asks_for_more_blocks_than_there_are_is_refused(refusal, load):
    window = {"mode": "bslongformer", "block": 16, "num_sliding_window_blocks": 33}
    assert refusal({"sparse_attention": window, "sparse_llama": {"seq_length": 500}}) == (
        "sparse_attention.num_sliding_window_blocks: 33 blocks of 16, but a layout of 500 tokens has 32; "
        "use at most 32, or sparse_llama.attention.master_length >= 513"
    )
    longer = {"seq_length": 500, "attention": {"master_length": 513}}
    assert not load({"sparse_attention": window, "sparse_llama": longer}).layouts.is_dense


def test_a_shorter_seq_length_flag_crops_the_documents_layout(load):
    document = {"sparse_attention": {"mode": "fixed"}, "sparse_llama": {"seq_length": 512}}
    assert load(document, seq_length=128).settings.attention.master_length == 512
    assert load(document, seq_length=1024).settings.attention.master_length == 1024


def test_the_default_document_needs_nothing_but_a_batch_size(load):
    run = load({}, output_dir=Path("/nonexistent/out"))
    assert run.micro_batch_size == 4
    assert run.zero_stage == 0
    assert run.precision == "fp32"
    assert run.offload == "none"
    assert run.checkpointing is None
    assert run.settings.training.epochs == 1
    assert run.notices == ()


@pytest.mark.parametrize(("block", "package"), [("wandb", "wandb"), ("comet", "comet-ml")])
def test_a_monitor_without_its_package_is_refused(refusal, load, monkeypatch, block, package):
    monkeypatch.setattr(combinations, "find_spec", lambda module: None)
    assert refusal({block: {"enabled": True}}) == (
        f"{block}.enabled: needs the package {package}, which is not installed; pip install {package}, or "
        "set it to false"
    )
    load({block: {"enabled": False}})
    monkeypatch.setattr(combinations, "find_spec", lambda module: object())
    load({block: {"enabled": True}})
