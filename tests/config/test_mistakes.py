"""Every mistake in a document is one line: the key's path, what was found, what is allowed, what to do."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from sparse_llama.config.removed import REMOVED, UNSUPPORTED
from sparse_llama.config.section import Section

AUTO_PLACES = (
    "scheduler.params.total_num_steps, scheduler.params.warmup_max_lr, sparse_llama.attention.backend, "
    "sparse_llama.memory.head_groups, sparse_llama.model.rope_parameters.factor, "
    "zero_optimization.reduce_bucket_size"
)
COMMENT = 'leave it out, or start it with "_" to make it a comment'


def nested(path: str, value: Any) -> dict[str, Any]:
    """Return the document in which only ``path`` is given."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


UNKNOWN = {
    "gradient_acumulation_steps": "did you mean 'gradient_accumulation_steps'?",
    "zero_optimisation": "did you mean 'zero_optimization'?",
    "Optimizer": "did you mean 'optimizer'?",
    "stage": "did you mean 'zero_optimization.stage'?",
    "lr": "did you mean 'optimizer.params.lr'?",
    "warmup_num_steps": "did you mean 'scheduler.params.warmup_num_steps'?",
    "num_local_blocks": "did you mean 'sparse_attention.num_local_blocks'?",
    "prompt_length": "did you mean 'sparse_llama.adapter.prompt_length'?",
    "xyzzy": COMMENT,
    "zero_optimization.stag": "did you mean 'stage'?",
    "zero_optimization.offload_param.devise": "did you mean 'device'?",
    "zero_optimization.stage3_max_live_parameter": "did you mean 'stage3_max_live_parameters'?",
    "zero_optimization.xyzzy": COMMENT,
    "fp16.loss_scale_windw": "did you mean 'loss_scale_window'?",
    "tensorboard.enable": "did you mean 'enabled'?",
    "wandb.xyzzy": "allowed: enabled, group, team, project",
    "timers.throughput.sync": "allowed: enabled, synchronized",
    "sparse_llama.seq_len": "did you mean 'seq_length'?",
    "sparse_llama.training.step": "did you mean 'steps'?",
    "sparse_llama.model.xyzzy": "allowed: path, revision, random_weights, trust_remote_code, rope_parameters",
}


@pytest.mark.parametrize(("path", "hint"), UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(refusal, path: str, hint: str):
    assert refusal(nested(path, 1)) == f"{path}: unknown key; {hint}"


def test_unknown_optimizer_and_scheduler_parameters_are_refused_with_the_nearest_known_one(refusal):
    optimizer = {"optimizer": {"type": "AdamW", "params": {"beta": [0.9, 0.95]}}}
    scheduler = {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}
    assert refusal(optimizer) == "optimizer.params.beta: unknown key; did you mean 'betas'?"
    assert refusal(scheduler).startswith("scheduler.params.warmup_steps: unknown key; did you mean 'warmup_")


def test_a_misspelt_key_is_told_before_a_missing_one_that_it_causes(refusal):
    block = {"optimizer": {"tpye": "AdamW"}}
    assert refusal(block) == "optimizer.tpye: unknown key; did you mean 'type'?"


def test_a_key_given_in_both_its_spellings_is_refused(refusal):
    zero = {"stage": 3, "prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2}
    assert refusal({"zero_optimization": zero}) == (
        "zero_optimization.prefetch_bucket_size: given twice, also as stage3_prefetch_bucket_size; "
        "keep one of them"
    )


WRONG: list[tuple[str, Any, str]] = [
    ("train_batch_size", "8", 'must be an integer, got "8"'),
    ("train_batch_size", 8.0, "must be an integer, got 8.0"),
    ("train_batch_size", True, "must be an integer, got true"),
    ("train_batch_size", 0, "must be >= 1, got 0"),
    ("gradient_clipping", -1, "must be >= 0.0, got -1"),
    ("gradient_predivide_factor", 0, "must be > 0.0, got 0"),
    ("bf16", True, "must be an object, got true"),
    ("bf16.enabled", 1, "must be true or false, got 1"),
    ("zero_optimization", None, "must be an object, got null"),
    ("zero_optimization.stage", 4, "must be <= 3, got 4"),
    ("zero_optimization.stage", "2", 'must be an integer, got "2"'),
    ("zero_optimization.reduce_bucket_size", 5.5, 'must be an integer >= 1 or "auto", got 5.5'),
    ("zero_optimization.offload_param.device", "gpu", "must be 'none', 'cpu' or 'nvme', got \"gpu\""),
    (
        "zero_optimization.leaf_module.classes",
        [5],
        "must be a string or a list of strings, got [5]",
    ),
    (
        "communication_data_type",
        "FP16",
        "must be 'fp32', 'fp16' or 'bf16', got \"FP16\"; did you mean 'fp16'?",
    ),
    ("optimizer", [], "must be an object, got []"),
    ("sparse_attention", [], "must be an object, got []"),
    ("sparse_llama.seq_length", 1, "must be >= 2, got 1"),
    ("sparse_llama.seed", -1, "must be >= 0, got -1"),
    ("sparse_llama.adapter.version", "v3", "must be 'v1' or 'v2', got \"v3\""),
    (
        "sparse_llama.adapter.bias",
        ["q"],
        "must be true, false, or a list of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, "
        'got ["q"]',
    ),
    ("sparse_llama.adapter.lm_head", "all", 'must be true, false, "scale" or "bias", got "all"'),
    (
        "sparse_llama.adapter",
        {"start_layer": 2, "top_layers": 4},
        "start_layer (2) and top_layers (4) are both given; keep one of them",
    ),
    (
        "sparse_llama.adapter",
        {"version": "v1", "scale": True},
        "scale is true, but version v1 has prompts and gates only; use version v2 or leave it out",
    ),
    ("sparse_llama.model.path", " ", 'must be a hub id, a path or bundled:tiny-llama, got " "'),
    ("sparse_llama.model.path", "a\0b", 'must be a hub id, a path or bundled:tiny-llama, got "a\\u0000b"'),
    (
        "sparse_llama.model.path",
        "bundled:tinyllama",
        "no bundled model is called \"bundled:tinyllama\"; did you mean 'bundled:tiny-llama'?",
    ),
    (
        "sparse_llama.data.dataset",
        "bundled:tiny-llama",
        'no bundled data set is called "bundled:tiny-llama"; allowed: bundled:people',
    ),
    ("compile.deepcompile", True, "true is not supported: compiling the whole model is not tested here; "),
    ("sequence_parallel_size", 0, "must be >= 1, got 0"),
    ("sparse_llama.data.dataset", "x" * 99 + "\n", "must be a hub id, a path or bundled:people, got "),
]


@pytest.mark.parametrize(
    ("path", "value", "line"),
    WRONG,
    ids=[f"{path}={str(value)[:9]!a}" for path, value, _ in WRONG],
)
def test_a_wrong_value_is_refused_with_what_was_found_and_what_is_allowed(
    refusal, path: str, value, line: str
):
    said = refusal(nested(path, value))
    assert said.startswith(f"{path}: {line}")
    assert len(said) < 200


def test_wrong_values_of_optimizer_parameters_are_refused_with_their_path(refusal):
    def said(**params: Any) -> str:
        return refusal({"optimizer": {"type": "AdamW", "params": params}})

    assert said(lr="1e-3") == 'optimizer.params.lr: must be a number, got "1e-3"'
    assert said(lr=0) == "optimizer.params.lr: must be > 0.0, got 0"
    assert said(betas=[0.9]) == "optimizer.params.betas: must have more than 1 entry, got [0.9]"
    assert said(betas=[0.9, 0.9, 0.9]) == (
        "optimizer.params.betas: must have at most 2 entries, got [0.9, 0.9, 0.9]"
    )
    assert said(betas=[0.9, 2]) == "optimizer.params.betas[1]: must be < 1.0, got 2"
    assert said(bias_correction=False).startswith("optimizer.params.bias_correction: false is not supported")


def test_unknown_types_are_refused_with_those_there_are(refusal):
    assert refusal({"optimizer": {"type": "AdamV"}}) == (
        "optimizer.type: no optimizer here is called 'AdamV'; did you mean 'Adam'?"
    )
    assert refusal({"optimizer": {"type": "OneBitAdam"}}) == (
        "optimizer.type: no optimizer here is called 'OneBitAdam'; allowed: AdamW, Adam, Lion, Adagrad, SGD"
    )
    assert refusal({"scheduler": {"type": "Warmup"}}) == (
        "scheduler.type: no scheduler is called 'Warmup'; did you mean 'WarmupLR'?"
    )
    assert refusal({"optimizer": {"params": {}}}) == "optimizer.type: missing; this key is required"


def test_schedule_parameters_that_may_be_auto_say_so(refusal):
    def said(**params: Any) -> str:
        return refusal({"scheduler": {"type": "WarmupDecayLR", "params": params}})

    wanted = 'must be an integer >= 1 or "auto"'
    assert said(total_num_steps=1.5) == f"scheduler.params.total_num_steps: {wanted}, got 1.5"
    assert said(total_num_steps=0) == f"scheduler.params.total_num_steps: {wanted}, got 0"
    assert said(warmup_max_lr=0) == 'scheduler.params.warmup_max_lr: must be a number > 0 or "auto", got 0'


@pytest.mark.parametrize(
    "path", ["train_batch_size", "gradient_clipping", "bf16.enabled", "tensorboard.job_name"]
)
def test_auto_is_refused_where_nobody_would_resolve_it(refusal, path: str):
    assert refusal(nested(path, "auto")) == (
        f'{path}: "auto" is resolved only at {AUTO_PLACES}; give a value or leave it out'
    )


def test_auto_is_refused_in_a_list_too(refusal):
    said = refusal({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, "auto"]}}})
    assert said.startswith('optimizer.params.betas[1]: "auto" is resolved only at ')


def test_auto_is_resolved_where_the_message_says_so(load):
    run = load(
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {"total_num_steps": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 2},
            },
            "sparse_llama": {"attention": {"backend": "auto"}, "training": {"steps": 40}},
        }
    )
    assert run.schedule.total_steps == 40
    assert run.schedule.max_lr == 3e-4


@pytest.mark.parametrize("path", [*REMOVED, *UNSUPPORTED])
def test_a_key_with_a_history_says_what_to_use_instead(refusal, path: str):
    document = nested(path, {"enabled": True})
    if path.startswith("optimizer."):
        document["optimizer"]["type"] = "AdamW"
    said = refusal(document)
    assert said == f"{path}: {(REMOVED | UNSUPPORTED)[path]}"
    assert re.search(r"leave it out|use |set |see |nothing replaces it|without it", said)


def test_the_first_mistake_of_several_is_told_alone(refusal):
    said = refusal({"train_batch_sise": 1, "zero_optimisation": {}, "bf16": 3})
    assert said == "train_batch_sise: unknown key; did you mean 'train_batch_size'?"


def test_a_key_that_takes_null_is_null_by_default():
    """So that a null can be taken for "not given"."""
    fields = [
        (f"{section.__name__}.{name}", field)
        for section in descendants(Section)
        for name, field in section.model_fields.items()
        if type(None) in get_args(field.annotation)
    ]
    assert len(fields) > 40
    assert [name for name, field in fields if field.get_default() is not None] == []


def descendants(section: type[Section]) -> set[type[Section]]:
    """Return every block there is."""
    return {below for child in section.__subclasses__() for below in (child, *descendants(child))}


def test_null_is_not_given_for_every_top_level_block_that_may_be_left_out(load: Callable[..., Any]):
    optional = (
        "bf16",
        "fp16",
        "optimizer",
        "scheduler",
        "activation_checkpointing",
        "sparse_attention",
        "aio",
    )
    run = load(dict.fromkeys(optional), output_dir=Path("/nonexistent/out"))
    bare = load({}, output_dir=Path("/nonexistent/out"))
    assert run.to_json() == bare.to_json()
    assert None not in run.deepspeed.values()
