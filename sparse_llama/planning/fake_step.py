"""One micro-step of a run's model without its data: the very model code, and a journal of what it allocates.

The model is put together by ``model.assemble``; no file but the configuration is read. Only what depends
on data is given: which tokens are labelled, and where documents lie.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.adapters.attach import first_trained_layer
from sparse_llama.attention.documents import Documents
from sparse_llama.attention.interface import AttentionPlan
from sparse_llama.attention.tile_loop import sampled_tiles
from sparse_llama.attention.workspace import OPERATOR_WORKSPACES
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.config.settings import AdapterSettings, MemorySettings
from sparse_llama.memory.checkpointing import offload_engine
from sparse_llama.memory.stage3 import hand_on_copies, linear_of_stage3
from sparse_llama.model.assemble import add_parts
from sparse_llama.model.objective import TokenLoss
from sparse_llama.planning.cpu_temporaries import CPU_TEMPORARIES
from sparse_llama.planning.labels import label_modules
from sparse_llama.planning.prepared_attention import prepare_layouts
from sparse_llama.planning.tracker import Journal, Kind, MemoryTracker, Place

Target = Literal["meta", "cpu"]
"""``meta`` stands for the accelerator."""


@dataclass(frozen=True)
class StepShape:
    """A model and a micro-batch: everything that the memory of a step depends on."""

    config: LlamaConfig
    adapter: AdapterSettings
    memory: MemorySettings
    checkpointing: ActivationCheckpointing | None
    attention: AttentionPlan
    """Of nobody else: tables of its layouts are made for this step."""
    dtype: torch.dtype
    documents: Documents
    """Over whole rows, where ranks share them."""
    num_labelled: int
    """Of this rank."""
    target: Target
    is_stage3: bool = False
    has_linear_of_stage3: bool = False


class TracedParameter(NamedTuple):
    """A parameter of the model that ran."""

    layer: int | None
    """None is the embedding, the last norm or the head."""
    kind: Kind
    numel: int
    is_trained: bool


@dataclass(frozen=True)
class Trace:
    """What a step did."""

    journal: Journal
    parameters: tuple[TracedParameter, ...]
    replaced: tuple[tuple[int | None, Kind], ...]
    """Layer and kind of the base's parameters that the adapter put others in place of, and keeps."""
    first_trained: int
    """Layer."""
    stored_bytes: int
    """Layer inputs that were sent away in the forward pass."""
    loaded_bytes: int
    drive_bytes: int


class _GivenLabels(TokenLoss):
    """The loss with as many labelled tokens as it is told."""

    num_labelled = 0

    def labelled_rows(self, shift_labels: torch.Tensor) -> torch.Tensor:
        return torch.empty(self.num_labelled, dtype=torch.int64, device=shift_labels.device)


def run_step(shape: StepShape) -> Trace:
    """Return the journal of a forward and a backward pass, and of the model before them."""
    table_bytes = prepare_layouts(
        shape.attention,
        shape.documents,
        shape.config,
        dtype=shape.dtype,
        target=shape.target,
        head_groups=shape.memory.num_head_groups,
    )
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    is_meta = shape.target == "meta"
    places: dict[str, Place] = {"meta": "gpu", "cpu": "host"} if is_meta else {"cpu": "host"}
    workspaces = OPERATOR_WORKSPACES if is_meta else {**OPERATOR_WORKSPACES, **CPU_TEMPORARIES}
    tracker = MemoryTracker(places, workspaces, fake if is_meta else None)
    below: AbstractContextManager[Any] = nullcontext() if is_meta else fake
    linear = linear_of_stage3() if shape.has_linear_of_stage3 else nullcontext()
    # what is drawn without data must not move the process' random numbers
    with torch.random.fork_rng([]), below, tracker, sampled_tiles(tracker), linear:
        tracker.journal.begin("model")
        model, base = _make_model(shape, tracker)
        parameters = [
            TracedParameter(
                _layer_of(name), tracker.note(parameter).kind, parameter.numel(), parameter.requires_grad
            )
            for name, parameter in model.named_parameters()
        ]
        with tracker.labelled("attention tables"):
            tables = torch.empty(table_bytes, dtype=torch.uint8, device=shape.target)
        _make_step(shape, model, tracker)
        del tables
        first, engine = first_trained_layer(model), offload_engine(model)
    present = {id(parameter) for parameter in model.parameters()}
    hidden = [(name, parameter) for name, parameter in base.items() if id(parameter) not in present]
    for name, parameter in hidden:
        tracker.relabel(parameter, "weights", f"{_without_index(name)} of the base")
    replaced = tuple((_layer_of(name), tracker.note(parameter).kind) for name, parameter in hidden)
    moved = (0, 0, 0) if engine is None else (engine.stored_bytes, engine.loaded_bytes, engine.drive_bytes)
    return Trace(tracker.journal, tuple(parameters), replaced, first, *moved)


def _make_model(shape: StepShape, tracker: MemoryTracker) -> tuple[LlamaForCausalLM, dict[str, nn.Parameter]]:
    """Return the adapted model, and the parameters of its base by name."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(shape.target), tracker.labelled("weights"):
            model: Any = LlamaForCausalLM(shape.config)
    finally:
        torch.set_default_dtype(before)
    base = dict(model.named_parameters())
    with tracker.labelled("adapters"):
        add_parts(
            model,
            shape.attention,
            shape.adapter,
            shape.memory,
            shape.checkpointing,
            seed=0,
            dtype=shape.dtype,
        )
    if shape.is_stage3:
        hand_on_copies(model)
    for name, parameter in model.named_parameters():
        component = "adapters" if parameter.requires_grad else "weights"
        tracker.relabel(parameter, component, _without_index(name))
    for name, buffer in model.named_buffers():
        tracker.relabel(buffer, "rope", name)
    return model.train(), base


def _make_step(shape: StepShape, model: LlamaForCausalLM, tracker: MemoryTracker) -> None:
    sharing = 1 if shape.attention.sequence is None else shape.attention.sequence.size
    rows, tokens = shape.documents.num_rows, shape.documents.num_tokens // sharing
    objective = _GivenLabels(model, loss_tile=shape.memory.loss_tile)
    objective.num_labelled = shape.num_labelled
    objective.train()
    with tracker.labelled("batch"):
        ids, positions, labels = (
            torch.empty(rows, tokens, dtype=torch.int64, device=shape.target) for _ in range(3)
        )
    shape.attention.remember(positions, shape.documents)
    with label_modules(objective, tracker):
        tracker.journal.begin("embedding")
        loss = objective(ids, positions, labels)
        tracker.journal.begin("loss backward")
        loss.backward()
        tracker.journal.begin("end")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tracker.relabel(parameter.grad, "gradients", _without_index(name))


def _layer_of(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def _without_index(name: str) -> str:
    """Return a parameter's name without the number of its layer: ``layers.self_attn.q_proj.weight``."""
    return ".".join(part for part in name.removeprefix("model.").split(".") if not part.isdigit())
