"""The ``zero_optimization`` and ``aio`` blocks, as DeepSpeed 0.19.8 knows them."""

import sys
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from sparse_llama.config.section import IntegralInt, Section, either, only

Device = Literal["none", "cpu", "nvme"]
Count = Annotated[IntegralInt, Field(ge=0)]

_FP32_MASTERS = "the adapter is trained in fp32 masters"
_UNQUANTIZED = "it changes the numbers that a frozen base computes, and is not tested here"


class OffloadParam(Section):
    """``zero_optimization.offload_param``: stage 3's parameters."""

    device: Device = "none"
    nvme_path: str | None = None
    buffer_count: Count = 5
    buffer_size: Count = 10**8
    max_in_cpu: Count = 10**9
    pin_memory: bool = True


class OffloadOptimizer(Section):
    """``zero_optimization.offload_optimizer``: optimizer state, and the update computed on the CPU."""

    device: Device = "none"
    nvme_path: str | None = None
    buffer_count: Count = 4
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: Annotated[float, only(1.0, "an adapter's optimizer state is megabytes and goes to one place")] = (
        1.0
    )
    super_offload: Annotated[bool, only(False, "it needs a Grace Hopper machine and is not tested here")] = (
        False
    )
    cpuadam_cores_perc: Annotated[float, Field(ge=0, le=1)] = 0.8


_Names = Annotated[str | list[str], either("a string or a list of strings")]


class LeafModule(Section):
    """``zero_optimization.leaf_module``: modules that stage 3 gathers whole."""

    classes: _Names = []
    names: _Names = []
    name_suffixes: _Names = []


class ZeroOptimization(Section):
    """``zero_optimization``; stage-3 keys may be written with or without their ``stage3_``, as in
    DeepSpeed."""

    model_config = ConfigDict(populate_by_name=True)

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Annotated[
        Literal["auto"] | Annotated[IntegralInt, Field(gt=0)], either('an integer >= 1 or "auto"')
    ] = "auto"
    """Elements whose gradients are reduced together, in a buffer that is taken whole; "auto" is all that
    train. DeepSpeed's own default of 5e8 is 1 GB in 16 bits, for an adapter's megabytes."""
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Count = 5 * 10**8
    overlap_comm: bool | None = None
    compute_grad_norm: Annotated[
        bool, only(True, "metrics.jsonl records the gradient norm of every step")
    ] = True
    load_from_fp32_weights: bool = True
    elastic_checkpoint: Annotated[
        bool, only(False, "checkpoints of this project fit any number of processes")
    ] = False
    offload_param: OffloadParam | None = None
    offload_optimizer: OffloadOptimizer | None = None
    sub_group_size: Count = 10**9
    prefetch_bucket_size: Count = Field(default=5 * 10**7, alias="stage3_prefetch_bucket_size")
    param_persistence_threshold: Count = Field(default=10**5, alias="stage3_param_persistence_threshold")
    model_persistence_threshold: Count = Field(
        default=sys.maxsize, alias="stage3_model_persistence_threshold"
    )
    max_live_parameters: Count = Field(default=10**9, alias="stage3_max_live_parameters")
    max_reuse_distance: Count = Field(default=10**9, alias="stage3_max_reuse_distance")
    gather_16bit_weights_on_model_save: bool = Field(
        default=False, alias="stage3_gather_16bit_weights_on_model_save"
    )
    module_granularity_threshold: Count = Field(default=0, alias="stage3_module_granularity_threshold")
    use_all_reduce_for_fetch_params: bool = Field(
        default=False, alias="stage3_use_all_reduce_for_fetch_params"
    )
    allgather_sequential: bool = Field(default=False, alias="stage3_allgather_sequential")
    ignore_unused_parameters: bool = True
    legacy_stage1: Annotated[bool, only(False, "the old stage 1 is not tested here")] = False
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    zero_hpz_partition_size: Annotated[int, only(1, "secondary partitions are not tested here")] = 1
    zero_quantized_weights: Annotated[bool, only(False, _UNQUANTIZED)] = False
    zero_quantized_nontrainable_weights: Annotated[bool, only(False, _UNQUANTIZED)] = False
    zero_quantized_gradients: Annotated[bool, only(False, _FP32_MASTERS)] = False
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    save_muon_momentum_buffer_in_memory: bool = False
    leaf_module: LeafModule = LeafModule()


class AsyncIO(Section):
    """``aio``: how NVMe offload reads and writes."""

    block_size: Annotated[IntegralInt, Field(ge=1)] = 1048576
    queue_depth: Annotated[int, Field(ge=1)] = 8
    intra_op_parallelism: Annotated[int, Field(ge=1)] = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: Annotated[bool, only(False, "GPUDirect storage is not tested here")] = False


STAGE3_KEYS = frozenset(
    {"sub_group_size", "module_granularity_threshold", "memory_efficient_linear", "override_module_apply"}
    | {"pipeline_loading_checkpoint", "log_trace_cache_warnings", "leaf_module", "max_live_parameters"}
    | {
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "max_reuse_distance",
    }
    | {"use_all_reduce_for_fetch_params", "allgather_sequential"}
    | {field.alias for field in ZeroOptimization.model_fields.values() if field.alias is not None}
)
"""Keys of ``zero_optimization`` that only stage 3 reads."""
UNUSED_KEYS = {
    "gather_16bit_weights_on_model_save": "adapters are saved by this project",
    "stage3_gather_16bit_weights_on_model_save": "adapters are saved by this project",
    "load_from_fp32_weights": "checkpoints are this project's own",
    "save_muon_momentum_buffer_in_memory": "the Muon optimizer is not used",
}
"""Keys of ``zero_optimization`` that nothing reads in any run of this project."""
