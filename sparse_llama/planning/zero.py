"""DeepSpeed's own memory by its rules: what ZeRO keeps of the adapter and, at stage 3, of the frozen base.

Lines are those of DeepSpeed 0.19.8. A frozen base has no gradients and no optimizer state, so stages 1 and 2
divide an adapter's, megabytes; only stage 3 and where parameters are offloaded to reach the weights. But
stages 1 to 3 also take buffers for reduction of ``reduce_bucket_size`` elements whatever there is to reduce.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from sparse_llama.config.run import Run
from sparse_llama.config.zero import ZeroOptimization
from sparse_llama.planning.phases import Alive
from sparse_llama.planning.tracker import Kind, Place

_MOMENTS = 2  # Adam's; Lion has one, which is megabytes less


class Parameter(NamedTuple):
    """A parameter of the whole model."""

    kind: Kind
    numel: int
    is_trained: bool
    is_in_layer: bool


@dataclass
class ZeroMemory:
    """What the engine adds to a step's own memory, and takes from it where it moves weights elsewhere."""

    always: Alive = field(default_factory=Counter)
    weights: Alive = field(default_factory=Counter)
    """Beside ``always``, and while the model is loaded already."""
    backward: Alive = field(default_factory=Counter)
    """From the loss to the end of the backward pass, beside ``always``."""
    loss: Alive = field(default_factory=Counter)
    """While the head is in use, beside both."""
    optimizer: Alive = field(default_factory=Counter)
    """While the optimizer updates, beside ``always``."""
    host_to_gpu: int = 0
    disk_to_host: int = 0
    """Of a micro-step."""


def zero_memory(
    run: Run,
    parameters: Sequence[Parameter],
    *,
    device: Literal["cuda", "cpu"],
    ranks: int,
) -> ZeroMemory:
    """Return the memory of ``run``'s DeepSpeed engine on one of ``ranks`` ranks.

    Args:
        parameters: of the whole model, each with what the step holds of it.
    """
    zero = ZeroOptimization.parse(run.deepspeed["zero_optimization"], "zero_optimization")
    here: Place = "gpu" if device == "cuda" else "host"
    memory = ZeroMemory()
    trained = [one for one in parameters if one.is_trained]
    numel = sum(one.numel for one in trained)
    dtype = trained[0].kind.dtype
    match zero.stage:
        case 0:
            _add_replicated(memory, here, numel, dtype)
        case 1 | 2:
            _add_partitioned_optimizer(memory, zero, here, numel, dtype, ranks)
        case _:
            _add_partitioned_optimizer(memory, zero, here, numel, dtype, ranks)
            _move_weights(memory, zero, here, parameters, dtype, ranks)
    return memory


def _add_replicated(memory: ZeroMemory, here: Place, numel: int, dtype: torch.dtype) -> None:
    """Stage 0: torch's optimizer over the parameters, or ``FP16_UnfusedOptimizer`` over fp32 copies."""
    if dtype != torch.float32:
        memory.always.update(
            _tensor(here, "optimizer", "fp32 masters", numel)
        )  # fp16/unfused_optimizer.py:79
        memory.optimizer.update(_tensor(here, "gradients", "in fp32", numel))  # step(): p.grad.to(p.dtype)
    memory.always.update(_tensor(here, "optimizer", "moments", _MOMENTS * numel))
    # torch's AdamW works on lists of tensors: the root of the second moments exists whole
    memory.optimizer.update(_tensor(here, "optimizer", "update", numel))


def _add_partitioned_optimizer(
    memory: ZeroMemory, zero: ZeroOptimization, here: Place, numel: int, dtype: torch.dtype, ranks: int
) -> None:
    """Stages 1 to 3: fp32 masters and moments of the rank's part, where they are offloaded to."""
    part = -(-numel // ranks)
    where = _offload_device(zero.offload_optimizer)
    states: Place = here if where == "none" else "host"
    if where == "nvme":
        assert zero.offload_optimizer is not None
        memory.always.update(_tensor("disk", "optimizer", "masters and moments", (1 + _MOMENTS) * part))
        # swap_tensor/optimizer_utils.py: buffer_count buffers of the largest group
        memory.always.update(
            _tensor("host", "optimizer", "swap buffers", zero.offload_optimizer.buffer_count * part)
        )
    else:
        memory.always.update(_tensor(states, "optimizer", "fp32 masters", part))  # stage_1_and_2.py:531
        memory.always.update(_tensor(states, "optimizer", "moments", _MOMENTS * part))
    if where != "none":
        memory.always.update(_tensor("host", "gradients", "of the rank's part, fp32", part))  # :937
        memory.always.update(_tensor("host", "optimizer", "copy for the device", part, dtype))  # :541
    elif dtype != torch.float32:
        memory.optimizer.update(_tensor(here, "gradients", "in fp32", part))
    memory.optimizer.update(_tensor(states, "optimizer", "update", part))
    if zero.contiguous_gradients:
        overlaps = zero.stage == 3 if zero.overlap_comm is None else zero.overlap_comm
        # Stage 3 has one for the whole run (stage3.py:782); 1 and 2 take one, or two where communication
        # overlaps, with the first gradient (stage_1_and_2.py:3266) and give them back after the last.
        count = 2 if overlaps and zero.stage < 3 else 1
        bucket = numel if zero.reduce_bucket_size == "auto" else zero.reduce_bucket_size
        buckets = _tensor(here, "DeepSpeed's buffers", "reduce_bucket_size", count * bucket, dtype)
        if zero.stage == 3:
            memory.always.update(buckets)
        else:
            memory.backward.update(buckets)
    if zero.stage == 3:
        memory.always.update(_tensor(states, "gradients", "of the rank's part", part, dtype))  # stage3.py:790


def _move_weights(
    memory: ZeroMemory,
    zero: ZeroOptimization,
    here: Place,
    parameters: Sequence[Parameter],
    dtype: torch.dtype,
    ranks: int,
) -> None:
    """Stage 3: every rank keeps a part of each parameter, and has whole those that it is about to use."""
    where = _offload_device(zero.offload_param)
    if ranks == 1 and (where == "none" or (where == "cpu" and here == "host")):
        return  # whole where they are used: nothing is gathered or copied (partition_parameters.py:74)
    item = dtype.itemsize
    for one in parameters:
        memory.weights[one.kind] -= one.kind.num_bytes
    parts = [-(-one.numel // ranks) for one in parameters]
    if where == "none":
        memory.weights.update(_tensor(here, "weights", "this rank's part", sum(parts), dtype))
    else:
        assert zero.offload_param is not None
        _add_offloaded(memory, zero, parts, dtype, is_pinned=here == "gpu" and zero.offload_param.pin_memory)
    threshold = zero.param_persistence_threshold
    persistent = sum(one.numel for one in parameters if one.numel <= threshold)
    moving = [one for one in parameters if one.numel > threshold]
    memory.weights.update(
        _tensor(here, "weights", "below stage3_param_persistence_threshold", persistent, dtype)
    )
    in_layers = [one.numel for one in moving if one.is_in_layer]
    others = [one.numel for one in moving if not one.is_in_layer]
    num_layers = max(1, sum(one.kind.name.endswith("q_proj.weight") for one in parameters))
    layer = sum(in_layers) // num_layers
    head = max(others, default=0)
    # A layer used again within max_reuse_distance is kept (partitioned_param_coordinator.py:654): the j-th
    # from the top is, after the head twice and j layers three times (forward, recomputed, backward).
    kept = 1 + max(0, (zero.max_reuse_distance - 2 * head) // max(1, 3 * layer))
    live = min(kept, num_layers) * layer
    if zero.prefetch_bucket_size:
        # Every module, a norm or an activation too, fetches a bucket ahead, so that they run ahead of the
        # computation up to max_live_parameters (:456); what is needed now is fetched beyond that.
        live = max(live, zero.max_live_parameters + layer)
    live = min(live, sum(in_layers))
    memory.weights.update(_tensor(here, "weights", "gathered layers", live, dtype))
    memory.loss.update(_tensor(here, "weights", "gathered head", head, dtype))
    if where != "none":
        passes = 2 if kept < num_layers else 1
        memory.host_to_gpu = item * (passes * sum(in_layers) + sum(others))
        memory.disk_to_host = memory.host_to_gpu if where == "nvme" else 0


def _add_offloaded(
    memory: ZeroMemory, zero: ZeroOptimization, parts: Sequence[int], dtype: torch.dtype, *, is_pinned: bool
) -> None:
    assert zero.offload_param is not None
    if zero.offload_param.device == "nvme":
        memory.weights.update(_tensor("disk", "weights", "this rank's part", sum(parts), dtype))
        elements = zero.offload_param.buffer_count * zero.offload_param.buffer_size
        # swap_tensor/partitioned_param_swapper.py:124
        memory.weights.update(
            _tensor("host", "DeepSpeed's buffers", "offload_param.buffer_size", elements, dtype)
        )
        return
    num_bytes = [part * dtype.itemsize for part in parts]
    memory.weights.update(_tensor("host", "weights", "this rank's part", sum(parts), dtype))
    if is_pinned:
        # One pinned block a tensor (partition_parameters.py:1843), and torch's pinned allocator rounds each
        # up to a power of two (ATen/core/CachingHostAllocator.h).
        slack = sum((1 << (size - 1).bit_length()) - size for size in num_bytes if size)
        memory.weights.update(_tensor("host", "weights", "rounding of pinned blocks", slack, torch.uint8))


def _offload_device(block: Any) -> str:
    return "none" if block is None else block.device


def tensor(place: Place, component: str, name: str, num_bytes: int) -> Alive:
    """Return bytes that are no tensor of the step's own."""
    kind = Kind(place, component, name, (num_bytes,), torch.uint8, num_bytes)
    return Counter({kind: num_bytes} if num_bytes else {})


def _tensor(place: Place, component: str, name: str, numel: int, dtype: torch.dtype = torch.float32) -> Alive:
    num_bytes = numel * dtype.itemsize
    kind = Kind(place, component, name, (numel,), dtype, num_bytes)
    return Counter({kind: num_bytes} if num_bytes else {})
