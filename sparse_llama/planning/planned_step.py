"""A micro-step of a run's whole model, put together from a run of a few of its layers."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import LlamaConfig

from sparse_llama.attention.documents import Documents, Group, whole_rows
from sparse_llama.attention.interface import AttentionPlan
from sparse_llama.config.run import Run
from sparse_llama.config.zero import ZeroOptimization
from sparse_llama.distributed.sequence import SequenceParallel
from sparse_llama.memory.checkpointing import inputs_every
from sparse_llama.model.assemble import DTYPES, plan_of_run
from sparse_llama.planning.fake_step import StepShape, Trace, run_step
from sparse_llama.planning.phases import Alive, Phase, compose, cut_into_phases
from sparse_llama.planning.prepared_attention import attention_flops
from sparse_llama.planning.sample import Sample, choose_layers
from sparse_llama.planning.zero import Parameter

BACKWARD_PASSES = 2.5
"""Of attention, in forward passes: five products over the pairs of tokens where that has two."""
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}  # others read positions, and allocate as much


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank, or of the ranks that share its rows."""

    documents: Documents
    num_labelled: int


@dataclass(frozen=True)
class PlannedStep:
    """A forward and a backward pass of all layers on one rank."""

    phases: list[Phase]
    parameters: list[Parameter]
    num_tokens: int
    """Of this rank."""
    first_trained: int
    """Layer."""
    stored_bytes: int
    """Layer inputs that are sent away, and brought back."""
    loaded_bytes: int
    drive_bytes: int
    attention_flops: float

    def saved_bytes_per_token(self) -> float:
        """Return what the forward pass of a trained layer leaves behind, the median: the lowest one's input
        is the embedding's, and the last one's may not have left for the host yet."""
        kept = [
            sum(phase.change.values())
            for phase in self.phases
            if phase.label == "forward" and phase.layer is not None and phase.layer >= self.first_trained
        ]
        return (statistics.median(kept) + self.drive_bytes / len(kept)) / self.num_tokens

    @property
    def flops(self) -> float:
        """Floating-point operations: products by their shapes, attention's by pairs of tokens."""
        return self.attention_flops + sum(phase.flops for phase in self.phases)


def make_batch(
    num_rows: int, num_tokens: int, num_labelled: int | None, lengths: Sequence[int] | None
) -> Batch:
    """Return a micro-batch.

    Args:
        num_labelled: None is every token.
        lengths: of the documents of every row; None is one.
    """
    labelled = num_rows * num_tokens if num_labelled is None else num_labelled
    if lengths is None:
        return Batch(whole_rows(num_rows, num_tokens), labelled)
    assert sum(lengths) == num_tokens, "the documents do not fill the row"
    groups: list[Group] = []
    first = 0
    for length in lengths:
        groups.append(Group(tuple(range(num_rows)), first, first + length))
        first += length
    return Batch(Documents(num_rows, num_tokens, tuple(groups)), labelled)


def plan_step(run: Run, config: LlamaConfig, device: str, batch: Batch) -> PlannedStep:
    """Return the micro-step of ``run`` on ``cuda`` or ``cpu``.

    Raises:
        ConfigError: the run cannot be made of this base: its adapter has no layer, its layout does not reach.
    """
    settings, documents = run.settings, batch.documents
    ranks = run.sequence_parallel_size
    sequence = None if ranks == 1 else SequenceParallel(ranks, 0)
    plan = plan_of_run(settings, run.layouts, config, num_tokens=documents.longest, sequence=sequence)
    sample = choose_layers(settings.adapter, run.checkpointing, plan.layers)
    zero = ZeroOptimization.parse(run.deepspeed["zero_optimization"], "zero_optimization")
    few = config.to_dict() | {"num_hidden_layers": len(sample.layers), "rope_parameters": _ROPE}
    trace = run_step(
        StepShape(
            config=LlamaConfig.from_dict(few),
            adapter=sample.adapter,
            memory=settings.memory,
            checkpointing=sample.checkpointing,
            attention=replace(plan, layers=tuple(plan.layers[index] for index in sample.layers)),
            dtype=DTYPES[run.precision],
            documents=documents,
            num_labelled=batch.num_labelled // ranks,
            target="meta" if device == "cuda" else "cpu",
            is_stage3=zero.stage == 3,
            has_linear_of_stage3=zero.stage == 3 and zero.memory_efficient_linear,
        )
    )
    return _complete(run, config, batch, plan, sample, trace)


def forward_passes(run: Run, num_trained: int) -> float:
    """Return how often each of the ``num_trained`` layers that train runs forward in a micro-step: again
    under a checkpoint or in head groups, and once more where its input was not kept."""
    block = run.checkpointing
    passes = 1.0 if block is None and run.settings.memory.num_head_groups is None else 2.0
    if block is not None:
        every = inputs_every(num_trained, block.number_checkpoints)
        passes += (every - 1) / every
    return passes


def _complete(
    run: Run, config: LlamaConfig, batch: Batch, plan: AttentionPlan, sample: Sample, trace: Trace
) -> PlannedStep:
    parameters = _all_parameters(trace, sample)
    others: Alive = Counter()
    for one in parameters:
        others[one.kind] += one.kind.num_bytes
    for one in trace.parameters:
        others[one.kind] -= one.kind.num_bytes
    for layer, kind in trace.replaced:
        if layer is not None:
            others[kind] += kind.num_bytes * (sample.traced_of.count(layer) - 1)
    num_frozen = sum(index < trace.first_trained for index in sample.traced_of)
    num_trained, num_run = len(sample.traced_of) - num_frozen, len(sample.layers) - trace.first_trained
    checkpointing, ranks = run.checkpointing, run.sequence_parallel_size
    every = 1 if checkpointing is None else inputs_every(num_trained, checkpointing.number_checkpoints)
    times = -(-num_trained // every) / -(-num_run // every)  # checkpoints, of all layers and of the few
    passes = forward_passes(run, num_trained) + BACKWARD_PASSES
    flops = attention_flops(plan, batch.documents, config)
    return PlannedStep(
        compose(cut_into_phases(trace.journal), sample.traced_of, others),
        parameters,
        num_tokens=batch.documents.num_rows * batch.documents.num_tokens // ranks,
        first_trained=num_frozen,
        stored_bytes=round(trace.stored_bytes * times),
        loaded_bytes=round(trace.loaded_bytes * times),
        drive_bytes=round(trace.drive_bytes * times),
        attention_flops=(sum(flops[:num_frozen]) + passes * sum(flops[num_frozen:])) / ranks,
    )


def _all_parameters(trace: Trace, sample: Sample) -> list[Parameter]:
    """Return the parameters of the whole model."""
    by_layer: dict[int | None, list[Parameter]] = {}
    for one in trace.parameters:
        made = Parameter(one.kind, one.numel, one.is_trained, one.layer is not None)
        by_layer.setdefault(one.layer, []).append(made)
    layers = [one for index in sample.traced_of for one in by_layer[index]]
    return [*by_layer[None], *layers]
