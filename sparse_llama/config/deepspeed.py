"""DeepSpeed's own blocks, strictly: every key that DeepSpeed 0.19.8 knows, and nothing else.

DeepSpeed ignores unknown top-level keys, and unknown keys of half of its blocks, in silence. Written by hand,
since the configuration must be checked before torch is imported; a test compares the keys with the installed
DeepSpeed's.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from sparse_llama.config.layers import layer_sparsities
from sparse_llama.config.optimizer import OPTIMIZERS, Optimizer, parse_optimizer
from sparse_llama.config.removed import find_key, refuse_auto, refuse_by_name
from sparse_llama.config.schedule import SCHEDULERS, Scheduler, parse_scheduler
from sparse_llama.config.section import (
    COMMENT_HINT,
    IntegralInt,
    Section,
    UnknownKeyError,
    join_path,
    only,
    suggest,
)
from sparse_llama.config.settings import Settings
from sparse_llama.config.sparsity import MODES
from sparse_llama.config.zero import AsyncIO, ZeroOptimization
from sparse_llama.errors import ConfigError

OUR_BLOCKS = ("sparse_attention", "sparse_llama")
Dtype = Literal["fp32", "fp16", "bf16"]
_MASTERS = "adapters keep fp32 masters: a scale near 1 cannot move by lr x gradient in 16 bits"
_DTYPES = 'the precision is that of the "bf16" or "fp16" block'
_NOT_COMPILED = "compiling the whole model is not tested here"


class BF16(Section):
    """``bf16``."""

    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: Annotated[bool, only(False, _MASTERS)] = False
    bf16_optimizer_states: Annotated[bool, only(False, _MASTERS)] = False


class FP16(Section):
    """``fp16``."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: float = Field(default=0.0, ge=0)
    initial_scale_power: int = Field(default=16, ge=0, le=64)
    loss_scale_window: int = Field(default=1000, ge=1)
    hysteresis: int = Field(default=2, ge=1)
    consecutive_hysteresis: bool = False
    min_loss_scale: int = Field(default=1, ge=1)
    fp16_master_weights_and_grads: Annotated[bool, only(False, _MASTERS)] = False


class ActivationCheckpointing(Section):
    """``activation_checkpointing``: its presence checkpoints the decoder layers, every one on its own."""

    partition_activations: Annotated[
        bool, only(False, "it splits activations among tensor-parallel ranks")
    ] = False
    contiguous_memory_optimization: Annotated[bool, only(False, "it belongs to partition_activations")] = (
        False
    )
    cpu_checkpointing: bool = False
    """Keep the layers' inputs in host memory."""
    number_checkpoints: Annotated[int, Field(ge=1)] | None = None
    """Layer inputs to keep: every k-th, k = ceil(layers that train / this); those between are computed again
    when their turn comes. Null keeps every layer's."""
    synchronize_checkpoint_boundary: Annotated[
        bool, only(False, "it is for timing DeepSpeed's own checkpoints")
    ] = False
    profile: Annotated[bool, only(False, "it is for timing DeepSpeed's own checkpoints")] = False


class TensorBoard(Section):
    """``tensorboard``; a missing output path is the run's own folder."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class Wandb(Section):
    """``wandb``."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class CSVMonitor(Section):
    """``csv_monitor``."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class Comet(Section):
    """``comet``; the key comes from the environment."""

    enabled: bool = False
    samples_log_interval: int = Field(default=100, ge=1)
    project: str | None = None
    workspace: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: Literal["get", "create", "get_or_create"] | None = None


class CommsLogger(Section):
    """``comms_logger``."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = []
    verbose: bool = False
    debug: bool = False


class FlopsProfiler(Section):
    """``flops_profiler``."""

    enabled: bool = False
    recompute_fwd_factor: float = Field(default=0.0, ge=0)
    profile_step: int = Field(default=1, ge=1)
    module_depth: int = Field(default=-1, ge=-1)
    top_modules: int = Field(default=1, ge=1)
    detailed: bool = True
    output_file: str | None = None


class TorchAutocast(Section):
    """``torch_autocast``."""

    enabled: Annotated[bool, only(False, _DTYPES)] = False
    dtype: str | None = None
    lower_precision_safe_modules: list[str] | None = None


class DataTypes(Section):
    """``data_types``."""

    grad_accum_dtype: Dtype | None = None
    """What gradients are summed in over micro-batches, at stages 2 and 3; null is the compute precision."""
    param_dtype: Annotated[str | None, only(None, _DTYPES)] = None
    buffer_dtype: Annotated[str | None, only(None, _DTYPES)] = None
    keep_in_fp32_modules: Annotated[list[str] | None, only(None, _DTYPES)] = None


class ThroughputTimer(Section):
    """``timers.throughput``."""

    enabled: bool = True
    synchronized: bool = True


class Timers(Section):
    """``timers``."""

    throughput: ThroughputTimer = ThroughputTimer()


class ParallelWrite(Section):
    """``checkpoint.parallel_write``."""

    pipeline_stage: bool = False


class CheckpointWriter(Section):
    """``checkpoint.writer``."""

    type: Literal["mock", "python", "fast", "MOCK", "PYTHON", "FAST"] | None = None
    decoupled: bool = False
    io_buffer_size: IntegralInt = Field(default=64 * 2**20, ge=1)
    io_buffer_double: bool = True
    show_statistics: bool = False
    data_parallel: Literal["replica", "socket", "machine", "REPLICA", "SOCKET", "MACHINE"] | None = None
    io_multiplier: int = Field(default=1, ge=1)


class Checkpoint(Section):
    """``checkpoint``: of DeepSpeed's own checkpoints, which this project does not write."""

    tag_validation: Literal["Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL", "ignore", "warn", "fail"] = (
        "Warn"
    )
    load_universal: Annotated[
        bool, only(False, "checkpoints of this project fit any stage and number of ranks")
    ] = False
    use_node_local_storage: bool = False
    parallel_write: ParallelWrite = ParallelWrite()
    checkpoint_serialization: bool = True
    writer: CheckpointWriter | None = None


class HybridEngine(Section):
    """``hybrid_engine``."""

    enabled: Annotated[
        bool, only(False, "it switches between training and DeepSpeed's inference kernels")
    ] = False
    max_out_tokens: int = Field(default=512, ge=1)
    inference_tp_size: int = Field(default=1, ge=1)
    release_inference_cache: bool = False
    pin_parameters: bool = True
    tp_gather_partition_size: int = Field(default=8, ge=1)
    enable_cuda_graph: bool = False


class Compile(Section):
    """``compile``."""

    deepcompile: Annotated[bool, only(False, _NOT_COMPILED)] = False
    autoep_non_moe: bool = False
    free_activation: bool = False
    free_activation_threshold: IntegralInt = 10 * 2**20
    offload_activation: bool = False
    offload_activation_pin_memory: bool = True
    offload_opt_states: bool = False
    double_buffer: bool = True
    symmetric_memory: bool = False
    debug_log: bool = False
    offload_parameters: bool = False
    sync_before_reduce: bool = False
    sync_after_reduce: bool = False
    sync_before_allgather: bool = False
    sync_after_allgather: bool = False
    keep_int_input_tensors: bool = True
    keep_all_input_tensors: bool = False
    passes: list[Literal["z1", "z3", "autosp", "autotp"]] | None = None


_Positive = Annotated[int, Field(ge=1)]


class Document(Section):
    """The whole document: DeepSpeed's top-level keys, ``sparse_attention`` and ``sparse_llama``."""

    train_batch_size: _Positive | None = None
    train_micro_batch_size_per_gpu: _Positive | None = None
    gradient_accumulation_steps: _Positive | None = None
    gradient_clipping: float = Field(default=1.0, ge=0)
    bf16: BF16 | None = None
    fp16: FP16 | None = None
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None
    zero_optimization: ZeroOptimization = ZeroOptimization()
    activation_checkpointing: ActivationCheckpointing | None = None
    sparse_attention: dict[str, object] | None = None
    sparse_llama: Settings = Settings()
    tensorboard: TensorBoard = TensorBoard()
    wandb: Wandb = Wandb()
    csv_monitor: CSVMonitor = CSVMonitor()
    comet: Comet = Comet()
    sequence_parallel_size: _Positive = 1
    """Consecutive ranks that share each row among them; every process counts for ZeRO all the same."""
    aio: AsyncIO | None = None
    data_types: DataTypes = DataTypes()
    communication_data_type: Dtype | None = None
    seq_parallel_communication_data_type: Dtype | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: float = Field(default=1.0, gt=0)
    gradient_allreduce_op: Annotated[str, only("mean", "every labelled token weighs the same already")] = (
        "mean"
    )
    managed_gradient_accumulation: Annotated[
        bool, only(True, "steps are counted by DeepSpeed's accumulation")
    ] = True
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    disable_allgather: bool = False
    disable_python_gc: bool = False
    steps_per_print: _Positive | None = None
    dump_state: bool = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    flops_profiler: FlopsProfiler = FlopsProfiler()
    comms_logger: CommsLogger = CommsLogger()
    timers: Timers = Timers()
    torch_autocast: TorchAutocast = TorchAutocast()
    compile: Compile = Compile()
    hybrid_engine: HybridEngine = HybridEngine()
    checkpoint: Checkpoint = Checkpoint()
    dataloader_drop_last: bool = False
    vocabulary_size: _Positive | None = None


_CHOSEN: dict[str, Mapping[str, type[Section]]] = {
    "optimizer.params": OPTIMIZERS,
    "scheduler.params": SCHEDULERS,
    "sparse_attention": MODES,
}
"""Blocks whose keys depend on a type or a mode that the document names."""


def check_document(document: Mapping[str, Any]) -> Document:
    """Return the checked document; relations between blocks are ``run.py``'s to check, after the flags.

    Raises:
        ConfigError: in one line, which key is wrong, what was found, what is allowed.
    """
    refuse_by_name(document)
    for key in document:
        if key not in Document.model_fields:
            raise ConfigError(f"{join_path('', key)}: unknown key{_home_of(key)}")
    try:
        checked = _parse_blocks(document)
    except UnknownKeyError:
        raise
    except ConfigError:
        refuse_auto(document)  # "must be an integer" is true of it, but no help
        raise
    refuse_auto(document)
    return checked


def _parse_blocks(document: Mapping[str, Any]) -> Document:
    checked = Document.parse(document)
    if checked.optimizer is not None:
        parse_optimizer(document["optimizer"])
    if checked.scheduler is not None:
        parse_scheduler(document["scheduler"])
    attention = checked.sparse_llama.attention
    layer_sparsities(checked.sparse_attention, attention.layouts, attention.dense_layers)
    return checked


def _home_of(key: str) -> str:
    """Return where an unknown top-level key belongs: a similar key, or the same key in a block."""
    near = suggest(key, Document.model_fields)
    if near:
        return near
    home = find_key(Document, key)
    for path, sections in _CHOSEN.items():
        if home is None and any(key in section.model_fields for section in sections.values()):
            home = f"{path}.{key}"
    return COMMENT_HINT if home is None else f"; did you mean {home!r}?"
