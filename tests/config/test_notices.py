"""What has no effect on a run is said once, and nothing is said of what has."""

from pathlib import Path
from typing import Any

import pytest
from shipped_documents import DOCUMENTS, load_shipped

from sparse_llama.config.notices import INERT_KEYS, LOGGED_KEYS, SWITCHED_BLOCKS
from sparse_llama.config.run import EMBEDDED
from sparse_llama.config.zero import UNUSED_KEYS

FIXED = {"mode": "fixed", "attention": "unidirectional"}
LOG_OFF = 'no effect; DeepSpeed\'s log is off without "log_level": "info"'

SAID: list[tuple[str, dict[str, Any], str]] = [
    ("a block that is off", {"bf16": {"enabled": False}}, "bf16: no effect; it is off"),
    (
        "a block without its switch",
        {"wandb": {"group": "a"}},
        'wandb: no effect; it is off without "enabled": true',
    ),
    (
        "a key that nothing reads",
        {"vocabulary_size": 32000},
        "vocabulary_size: no effect; the model's own is used",
    ),
    (
        "aio without nvme",
        {"aio": {"queue_depth": 4}},
        "aio: no effect; nothing is offloaded to nvme",
    ),
    ("a key of DeepSpeed's log", {"wall_clock_breakdown": True}, f"wall_clock_breakdown: {LOG_OFF}"),
    ("a block of DeepSpeed's log", {"comms_logger": {"enabled": True}}, f"comms_logger: {LOG_OFF}"),
    (
        "offload to nowhere",
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
        'zero_optimization.offload_optimizer: no effect; its device is "none"',
    ),
    (
        "parameters offloaded below stage 3",
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "zero_optimization.offload_param: no effect at stage 2; stage 3 offloads parameters",
    ),
    (
        "keys of a drive on the way to the host",
        {
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "cpu", "buffer_count": 9, "nvme_path": "/x"},
            }
        },
        "zero_optimization.offload_param: no effect of nvme_path, buffer_count; only nvme uses them",
    ),
    (
        "cores of another offload",
        {
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "cpu", "cpuadam_cores_perc": 0.5},
            }
        },
        "zero_optimization.offload_optimizer.cpuadam_cores_perc: no effect; it belongs to super_offload",
    ),
    (
        "a key of DeepSpeed's checkpoints",
        {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
        "zero_optimization.stage3_gather_16bit_weights_on_model_save: no effect; "
        "adapters are saved by this project",
    ),
    (
        "ZeRO's keys at stage 0",
        {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5e8}},
        "zero_optimization: no effect of overlap_comm, reduce_bucket_size; stage 0 switches ZeRO off",
    ),
    (
        "stage 3's keys at stage 2",
        {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1e9, "sub_group_size": 1e9}},
        "zero_optimization: no effect of stage3_max_live_parameters, sub_group_size at stage 2; "
        "only stage 3 reads them",
    ),
    (
        "an lr under a scheduler with its own",
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}},
        },
        "optimizer.params.lr: no effect; scheduler OneCycle sets the learning rate",
    ),
    (
        "an lr beside another peak",
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3}},
        },
        "optimizer.params.lr: no effect; scheduler.params.warmup_max_lr, 0.002, wins; "
        'make it "auto" to agree',
    ),
    (
        "a decay of another length",
        {
            "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 50}},
            "sparse_llama": {"training": {"steps": 20}},
        },
        'scheduler.params.total_num_steps: 50, but the run has 20 steps; "auto" follows the run',
    ),
    (
        "a master layout of dense attention",
        {"sparse_llama": {"attention": {"master_length": 1024}}},
        "sparse_llama.attention.master_length: no effect on dense attention",
    ),
    (
        "a direction that a causal model has not",
        {"sparse_attention": {"mode": "fixed"}},
        'sparse_attention.attention: "bidirectional" keeps its blocks, but no token of a causal model sees a '
        "later one: the causal mask is intersected",
    ),
    (
        "heads that could differ and do not",
        {"sparse_attention": FIXED | {"different_layout_per_head": True}},
        "sparse_attention.different_layout_per_head: no effect; this layout is the same for all heads",
    ),
    (
        "a split beside a validation set",
        {"sparse_llama": {"data": {"validation": "org/other", "validation_records": 9}}},
        "sparse_llama.data.validation_records: no effect; validation is given",
    ),
    (
        "the folder of a cache that is off",
        {"sparse_llama": {"data": {"cache": False, "cache_dir": "rows"}}},
        "sparse_llama.data.cache_dir: no effect; cache is false",
    ),
    (
        "lengths of packed rows",
        {"sparse_llama": {"data": {"group_by_length": True}}},
        "sparse_llama.data.group_by_length: no effect; packed rows are all of one length",
    ),
    (
        "lengths where a step is a micro-batch",
        {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 4,
            "sparse_llama": {"data": {"group_by_length": True, "packing": False}},
        },
        "sparse_llama.data.group_by_length: no effect; a step is one micro-batch",
    ),
    (
        "a revision of what is bundled",
        {"sparse_llama": {"model": {"revision": "main"}}},
        "sparse_llama.model.revision: no effect; the model is bundled",
    ),
    (
        "the length of answers that nobody asks for",
        {"sparse_llama": {"training": {"samples": 0, "max_new_tokens": 9}}},
        "sparse_llama.training.max_new_tokens: no effect; samples and exact_match_records are 0",
    ),
]


@pytest.mark.parametrize(("document", "line"), [case[1:] for case in SAID], ids=[case[0] for case in SAID])
def test_what_has_no_effect_is_said_once(load, document: dict[str, Any], line: str):
    assert load(document).notices == (line,)


def test_every_switched_block_says_that_it_is_off_and_is_kept_from_deepspeed(load):
    for block in SWITCHED_BLOCKS:
        run = load({block: {"enabled": False}})
        assert run.notices == (f"{block}: no effect; it is off",)
        assert block not in run.deepspeed


VALUES: dict[str, Any] = {
    "checkpoint": {"tag_validation": "Fail"},
    "compile": {"debug_log": True},
    "dataloader_drop_last": True,
    "disable_allgather": True,
    "hybrid_engine": {"enabled": False},
    "torch_autocast": {"enabled": False},
    "vocabulary_size": 8,
    "zero_force_ds_cpu_optimizer": False,
}


def test_every_inert_key_says_so_and_is_kept_from_deepspeed(load):
    assert VALUES.keys() == INERT_KEYS.keys()
    for key, value in VALUES.items():
        run = load({key: value})
        assert [line.split(":")[0] for line in run.notices] == [key]
        assert key not in run.deepspeed


def test_keys_of_shared_rows_have_no_effect_where_every_row_is_one_processes(load):
    for key, value in (("sequence_parallel_size", 1), ("seq_parallel_communication_data_type", "bf16")):
        run = load({key: value})
        assert [line.split(":")[0] for line in run.notices] == [key]
        assert key not in run.deepspeed


def test_where_rows_are_shared_gradients_are_summed_in_the_type_of_their_own_key(load):
    """DeepSpeed reads that one instead, without a word."""
    document = {"sequence_parallel_size": 2, "seq_parallel_communication_data_type": "bf16"}
    run = load(document, world_size=2)
    assert run.notices == ()
    assert document.items() <= run.deepspeed.items()
    run = load({"sequence_parallel_size": 2, "communication_data_type": "fp16"}, world_size=2)
    assert run.notices == (
        "communication_data_type: no effect; where ranks share rows, seq_parallel_communication_data_type is "
        "read (fp32)",
    )
    assert "communication_data_type" not in run.deepspeed


def test_deepspeeds_log_keys_act_when_the_log_is_on(load):
    on: dict[str, Any] = {"comms_logger": {"enabled": True, "verbose": True}}
    on |= {"dump_state": True, "steps_per_print": 10, "wall_clock_breakdown": True}
    assert on.keys() == set(LOGGED_KEYS)
    run = load(on | {"log_level": "info"})
    assert run.notices == ()
    assert on.items() <= run.deepspeed.items()
    silent = load(on)
    assert len(silent.notices) == len(on)
    assert not on.keys() & silent.deepspeed.keys()


def test_every_unused_key_of_zero_says_so_and_is_kept_from_deepspeed(load):
    for key in UNUSED_KEYS:
        run = load({"zero_optimization": {"stage": 3, key: True}})
        assert [line.split(":")[0] for line in run.notices] == [f"zero_optimization.{key}"]
        assert key not in run.deepspeed["zero_optimization"]


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ({}, "no layer is checkpointed"),
        ({"activation_checkpointing": {}}, "layer inputs stay on the device"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, None),
    ],
)
def test_a_drive_for_inputs_that_do_not_leave_the_device_says_so(load, block, why):
    memory = {"sparse_llama": {"memory": {"checkpoint_nvme_path": "/drive"}}}
    line = (
        f"sparse_llama.memory.checkpoint_nvme_path: no effect; {why} without "
        '"activation_checkpointing": {"cpu_checkpointing": true}'
    )
    assert load(block | memory).notices == (() if why is None else (line,))


def test_what_acts_is_not_talked_about(load):
    document = {
        "bf16": {"enabled": True},
        "tensorboard": {"enabled": True, "job_name": "a"},
        "csv_monitor": {"enabled": True},
        "flops_profiler": {"enabled": True, "profile_step": 2},
        "activation_checkpointing": {"cpu_checkpointing": True},
        "memory_breakdown": True,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "stage3_max_live_parameters": 1e8,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": {"device": "cpu"},
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "sparse_attention": FIXED | {"different_layout_per_head": True, "num_different_global_patterns": 2},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}},
        "sparse_llama": {"training": {"steps": 9, "max_new_tokens": 5}, "data": {"validation_records": 5}},
    }
    assert load(document).notices == ()


def test_random_blocks_may_differ_between_heads(load):
    block = {"mode": "bigbird", "attention": "unidirectional", "different_layout_per_head": True}
    assert load({"sparse_attention": block | {"num_random_blocks": 1}}).notices == ()
    assert len(load({"sparse_attention": block}).notices) == 1


@pytest.mark.parametrize("path", [EMBEDDED, *DOCUMENTS], ids=lambda p: p.stem)
def test_a_shipped_document_has_nothing_without_effect(path: Path, tmp_path: Path):
    assert load_shipped(path, tmp_path).notices == ()
