"""Keys with a history: what DeepSpeed removed, what has another name now, what this project does not do; one
line each."""

from collections.abc import Mapping

from sparse_llama.config.section import Section, join_path
from sparse_llama.errors import ConfigError

_GONE = "DeepSpeed removed it in 2026 (issue 8489)"
_CHECKPOINTS = "checkpoints are written by this project, see sparse_llama.training.save_every"
_OPTIMIZER_STATE = 'use "offload_optimizer": {"device": "cpu"}'

REMOVED: dict[str, str] = {
    "nebula": f"{_GONE}; {_CHECKPOINTS}",
    "compression_training": f"{_GONE}; nothing replaces it here",
    "amp": f'{_GONE}; use "bf16": {{"enabled": true}} or "fp16": {{"enabled": true}}',
    "quantize_training": f"{_GONE}; nothing replaces it here",
    "sparse_gradients": f"{_GONE}; a frozen embedding has no gradients, so leave it out",
    "eigenvalue": f"{_GONE}, with the quantization it served; leave it out",
    "elasticity": (
        f"{_GONE}; set train_batch_size, train_micro_batch_size_per_gpu or gradient_accumulation_steps"
    ),
    "graph_harvesting": f"{_GONE}; leave it out",
    "curriculum_learning": (
        f"{_GONE}; its successor, data_efficiency, would reorder the data and is not supported here; "
        "leave it out"
    ),
    "progressive_layer_drop": f"{_GONE}; leave it out",
    "zero_optimization.mics_shard_size": f"{_GONE}; use stage 3 without it",
    "zero_optimization.mics_hierarchical_params_gather": f"{_GONE}; use stage 3 without it",
    "zero_optimization.zeropp_loco_param": f"{_GONE}; leave it out",
    "zero_optimization.cpu_offload": f"an old name; {_OPTIMIZER_STATE}",
    "zero_optimization.cpu_offload_param": 'an old name; use "offload_param": {"device": "cpu"} at stage 3',
    "zero_optimization.cpu_offload_use_pin_memory": (
        "an old name; use pin_memory inside offload_optimizer or offload_param"
    ),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "an old name, and adapters are saved by this project anyway; leave it out"
    ),
    "bfloat16": "an old name; use bf16",
    "allgather_size": "an old name; use zero_optimization.allgather_bucket_size",
    "optimizer.params.max_grad_norm": (
        "DeepSpeed does not clip by it; use the top-level key gradient_clipping"
    ),
}
"""Keys of earlier DeepSpeeds, with their successors."""

UNSUPPORTED: dict[str, str] = {
    "pipeline": "pipeline parallelism is not supported; use zero_optimization.stage 3 to spread a model",
    "tensor_parallel": "tensor parallelism is not supported; use zero_optimization.stage 3 to spread a model",
    "expert_parallel": "LLaMA has no experts; leave it out",
    "use_data_before_expert_parallelism": "LLaMA has no experts; leave it out",
    "autotuning": (
        "the launcher's autotuner runs scripts of another form; set the batch sizes yourself and leave it out"
    ),
    "data_efficiency": "it would reorder and cut the data, which this project reads exactly; leave it out",
    "datastates_ckpt": _CHECKPOINTS,
    "weight_quantization": "a quantized base is not supported; leave it out",
    "data_parallel_size": "the launcher's number of processes decides; leave it out",
    "zero_optimization.zenflow": f"not supported; {_OPTIMIZER_STATE} without it",
    "comet.api_key": (
        "a secret has no place in a file that is saved with results; set COMET_API_KEY in the environment"
    ),
}
"""Keys that DeepSpeed 0.19.8 knows and this project refuses."""


def refuse_by_name(document: Mapping[str, object]) -> None:
    """Refuse every key of ``REMOVED`` and ``UNSUPPORTED`` that ``document`` has.

    Raises:
        ConfigError: the first such key, with what to use instead.
    """
    for path, reason in (REMOVED | UNSUPPORTED).items():
        *parents, key = path.split(".")
        block: object = document
        for parent in parents:
            block = block.get(parent) if isinstance(block, Mapping) else None
        if isinstance(block, Mapping) and key in block:
            raise ConfigError(f"{path}: {reason}")


AUTO_PATHS = frozenset(
    {
        "scheduler.params.total_num_steps",
        "scheduler.params.warmup_max_lr",
        "sparse_llama.attention.backend",
        "sparse_llama.memory.head_groups",
        "sparse_llama.model.rope_parameters.factor",
        "zero_optimization.reduce_bucket_size",
    }
)
"""Where "auto" has a meaning that this project resolves."""


def refuse_auto(value: object, path: str = "") -> None:
    """Refuse every ``"auto"`` in ``value`` that nobody would resolve; DeepSpeed would silently use some
    default.

    Raises:
        ConfigError: the first of them.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_auto(inner, join_path(path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            refuse_auto(inner, join_path(path, index))
    elif value == "auto" and path not in AUTO_PATHS:
        raise ConfigError(
            f'{path}: "auto" is resolved only at {", ".join(sorted(AUTO_PATHS))}; '
            "give a value or leave it out"
        )


def find_key(section: type[Section], key: str, path: str = "") -> str | None:
    """Return the path of the first ``key`` anywhere below ``section``; None if there is none."""
    if key in section.known_keys():
        return join_path(path, key)
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found = find_key(inner, key, join_path(path, name))
            if found is not None:
                return found
    return None
