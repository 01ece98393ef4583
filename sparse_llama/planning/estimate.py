"""The memory of a run, computed before it starts: what is alive on GPU, host and disk at the peak.

A micro-step of the run's own model code on tensors without data (``planned_step``), and DeepSpeed's memory by
its rules (``zero``). Bytes are those that the device's allocator counts. Not in them: the CUDA context and
what the allocator keeps in pieces too small to use, for which a budget needs a reserve.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from transformers import LlamaConfig

from sparse_llama.config.run import Run
from sparse_llama.planning.phases import Alive, Phase, add, size_of
from sparse_llama.planning.planned_step import PlannedStep, make_batch, plan_step
from sparse_llama.planning.tracker import Place
from sparse_llama.planning.zero import ZeroMemory, tensor, zero_memory
from sparse_llama.training.held import LIBRARIES

__all__ = ["LIBRARY_BYTES", "Estimate", "LiveTensor", "Place", "Traffic", "estimate"]

LIBRARY_BYTES = {"cpu": 480 * 2**20, "cuda": 3 * 2**29}
"""Resident memory of a process that has imported torch, transformers and DeepSpeed and done nothing: measured
on a CPU build; with CUDA's libraries and a context, an allowance."""
_PLACES: tuple[Place, ...] = ("gpu", "host", "disk")


@dataclass(frozen=True)
class LiveTensor:
    """Tensors alike in component, name, shape and dtype that are alive at a peak."""

    component: str
    """weights, adapters, gradients, optimizer, layer inputs, activations, logits and loss, workspaces, rope,
    batch, DeepSpeed's buffers, ..."""
    name: str
    """Where in the model it was made, as ``layers.self_attn.q_proj``; in the backward pass, by which node."""
    shape: tuple[int, ...]
    dtype: str
    """As ``bfloat16``."""
    count: int
    num_bytes: int
    """Of all ``count`` of them."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that cross a bus in one optimizer step on one rank."""

    gpu_to_host: int = 0
    host_to_gpu: int = 0
    host_to_disk: int = 0
    disk_to_host: int = 0


@dataclass(frozen=True)
class Estimate:
    """The peak of one rank; on the CPU everything is ``host``."""

    peak_bytes: dict[Place, int]
    components: dict[Place, dict[str, int]]
    """What is alive at each place's own peak; sums to ``peak_bytes``."""
    alive: tuple[LiveTensor, ...]
    """On the GPU (on the CPU: host) at its peak, largest first; sums to that place's peak."""
    phase: str
    """When: load, forward of layer i, loss, backward of layer i, or optimizer."""
    saved_bytes_per_token_and_layer: float
    """What a trained layer keeps for its backward pass, wherever it is kept; the median of trained layers."""
    traffic_bytes: Traffic
    flops: float
    """Of one optimizer step of one rank; attention by the density of its layout."""

    @property
    def run_bytes(self) -> dict[str, int]:
        """The peaks by place without what a process holds before it has a model."""
        return {
            place: count - self.components[place].get(LIBRARIES, 0)
            for place, count in self.peak_bytes.items()
        }


def estimate(
    run: Run,
    config: LlamaConfig,
    *,
    device: Literal["cuda", "cpu"],
    ranks: int = 1,
    num_tokens: int | None = None,
    micro_batch_size: int | None = None,
    num_labelled: int | None = None,
    document_lengths: Sequence[int] | None = None,
) -> Estimate:
    """Return what a step of ``run`` needs at most on each of ``ranks`` equal devices.

    Args:
        config: of the base model; no weights are read.
        device: what the run computes on; neither has to be there.
        num_tokens: of a row; None is the run's ``seq_length``.
        micro_batch_size: rows; None is the run's.
        num_labelled: labelled tokens of a micro-batch; None is all of them, the worst case.
        document_lengths: of the documents that fill every row, in order; None is one document a row.

    Raises:
        ConfigError: the run cannot be made of this base: its adapter has no layer, its layout does not reach.
    """
    batch = make_batch(
        micro_batch_size or run.micro_batch_size,
        num_tokens or run.settings.seq_length,
        num_labelled,
        document_lengths,
    )
    step = plan_step(run, config, device, batch)
    memory = zero_memory(run, step.parameters, device=device, ranks=ranks)
    here: Place = "gpu" if device == "cuda" else "host"
    moments = _moments(run, step, memory, LIBRARY_BYTES[device])
    peaks: dict[Place, _Moment] = {}
    for place in _PLACES:
        peak = _highest(moments, place)
        if place in (here, "host") or size_of(peak.alive[place], place):
            peaks[place] = peak
    micro_steps = run.gradient_accumulation_steps
    return Estimate(
        peak_bytes={place: size_of(one.alive[place], place) for place, one in peaks.items()},
        components={place: _components(one.alive[place], place) for place, one in peaks.items()},
        alive=_live_tensors(peaks[here].alive[here], here),
        phase=peaks[here].label,
        saved_bytes_per_token_and_layer=step.saved_bytes_per_token(),
        traffic_bytes=_traffic(step, memory, micro_steps),
        flops=micro_steps * step.flops,
    )


class _Moment(NamedTuple):
    """When a place may be at its peak."""

    label: str
    alive: dict[Place, Alive]
    """At the peak of each place."""


def _highest(moments: list[_Moment], place: Place) -> _Moment:
    return max(moments, key=lambda one: size_of(one.alive[place], place))


def _moments(run: Run, step: PlannedStep, memory: ZeroMemory, library_bytes: int) -> list[_Moment]:
    libraries = tensor("host", LIBRARIES, "torch, transformers, DeepSpeed", library_bytes)
    always = add(
        memory.always, memory.weights, libraries, tensor("disk", "layer inputs", "layers", step.drive_bytes)
    )
    end = step.phases[-1].start
    gradients: Alive = Counter()
    if run.gradient_accumulation_steps > 1:  # what earlier micro-steps left
        gradients = Counter({kind: size for kind, size in end.items() if kind.component == "gradients"})
    moments: list[_Moment] = []
    for phase in step.phases:
        if phase.label not in ("model", "end"):
            extra = add(always, gradients, _engine_extra(phase, memory))
            alive: dict[Place, Alive] = {
                place: add(phase.peaks.get(place, phase.start), extra) for place in _PLACES
            }
            label = phase.label if phase.layer is None else f"{phase.label} of layer {phase.layer}"
            moments.append(_Moment(label, alive))
    update = add(end, always, memory.optimizer)
    moments.append(_Moment("optimizer", dict.fromkeys(_PLACES, update)))
    moments.append(
        _Moment("load", dict.fromkeys(_PLACES, add(libraries, memory.weights, _while_loading(step))))
    )
    return moments


def _engine_extra(phase: Phase, memory: ZeroMemory) -> Alive:
    is_backward, is_head = phase.label in ("loss backward", "backward"), phase.label.startswith("loss")
    nothing: Alive = Counter()
    return add(memory.backward if is_backward else nothing, memory.loss if is_head else nothing)


def _while_loading(step: PlannedStep) -> Alive:
    """Return the model beside one tensor in fp32 on its way from a file (``model.llama``)."""
    loaded: Alive = Counter()
    for one in step.parameters:
        loaded[one.kind] += one.kind.num_bytes
    largest = max(one.numel for one in step.parameters)
    return add(loaded, tensor("host", "weights", "one tensor, read or drawn", 4 * largest))


def _components(alive: Alive, place: Place) -> dict[str, int]:
    found: Counter[str] = Counter()
    for kind, num_bytes in alive.items():
        if kind.place == place and num_bytes:
            found[kind.component] += num_bytes
    return dict(found.most_common())


def _live_tensors(alive: Alive, place: Place) -> tuple[LiveTensor, ...]:
    found = [
        LiveTensor(
            component=kind.component,
            name=kind.name,
            shape=kind.shape,
            dtype=str(kind.dtype).removeprefix("torch."),
            count=num_bytes // kind.num_bytes,
            num_bytes=num_bytes,
        )
        for kind, num_bytes in alive.items()
        if kind.place == place and num_bytes
    ]
    return tuple(sorted(found, key=lambda one: -one.num_bytes))


def _traffic(step: PlannedStep, memory: ZeroMemory, micro_steps: int) -> Traffic:
    copied: Counter[tuple[Place, Place]] = Counter()
    for phase in step.phases:
        if phase.label not in ("model", "end"):
            copied.update(phase.copied)
    on_drive = step.drive_bytes > 0  # nothing is copied to a drive here, it is counted
    out, back = (step.stored_bytes, step.loaded_bytes) if on_drive else (0, 0)
    return Traffic(
        gpu_to_host=micro_steps * (copied["gpu", "host"] + out),
        host_to_gpu=micro_steps * (copied["host", "gpu"] + back + memory.host_to_gpu),
        host_to_disk=micro_steps * out,
        disk_to_host=micro_steps * (back + memory.disk_to_host),
    )
