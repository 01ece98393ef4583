"""A whole training step - forward, backward, optimizer - beside plain transformers and PEFT.

Every contender has the same loss, rows, checkpointing and optimizer; only the adapter differs. The optimizer
is Adam over fp32 masters of what trains.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from sparse_llama.adapters.attach import first_trained_layer, trainable_parameters
from sparse_llama.benchmark.llamas import PLAIN, contenders, random_llama
from sparse_llama.benchmark.peak import extra_bytes
from sparse_llama.benchmark.shapes import Shape
from sparse_llama.benchmark.timing import Contender, Times, time_in_turns
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.data.packing import IGNORED
from sparse_llama.errors import ModelError
from sparse_llama.memory.checkpointing import checkpoint_layers
from sparse_llama.model.objective import TokenLoss

_CHECKED_TOKENS = 32
_MOST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # a few roundings
_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class StepSizes:
    """What is measured: steps of ``num_rows`` rows of ``num_tokens`` random tokens, every one predicted."""

    shape: Shape
    num_tokens: int
    num_rows: int
    top_layers: int
    """Layers of the v2 adapter that is on the top ones only."""
    checkpointing: tuple[bool, ...]
    dtype: torch.dtype
    repeats: int
    warm_up_s: float = 1.0

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class StepCost:
    """One contender; ``backward`` includes the optimizer, ``both`` is the step."""

    name: str
    trainable_parameters: int
    error: float
    """Largest difference of the untrained model's logits from the base's, over the largest logit."""
    times: Times
    ratio: float
    """Median step time over plain transformers'."""
    tokens_per_s: float
    extra_bytes: int | None
    """Peak of a step beyond model and optimizer."""


@dataclass(frozen=True)
class StepGroup:
    """All contenders, with checkpointing of every layer that has a backward pass, or without."""

    is_checkpointed: bool
    costs: tuple[StepCost, ...]


class TrainingStep:
    """One contender, ready to train."""

    def __init__(self, name: str, llama: LlamaForCausalLM, rows: torch.Tensor, error: float = 0.0) -> None:
        self.name, self.llama, self.rows, self.error = name, llama.train(), rows, error  # rows: (B, T)
        self.positions = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        self.shift_labels = F.pad(rows[:, 1:], (0, 1), value=IGNORED)
        self.loss = TokenLoss(llama)
        self.parameters = [parameter for _, parameter in trainable_parameters(llama)]
        # bf16 holds three digits: a scale near 1 would stay where it is. An fp32 parameter is its own master.
        self.masters = [nn.Parameter(one.detach().float()) for one in self.parameters]
        self.adam = torch.optim.Adam(self.masters, lr=_LEARNING_RATE) if self.masters else None

    def checkpoint(self, is_checkpointed: bool) -> None:
        """Switch checkpointing of the layers that have a backward pass; all of plain transformers' have."""
        first = 0 if self.name == PLAIN else first_trained_layer(self.llama)
        checkpoint_layers(self.llama, ActivationCheckpointing() if is_checkpointed else None, first)

    def forward(self) -> torch.Tensor:
        """Return the 0-dim mean loss."""
        num_predicted = self.rows.numel() - self.rows.shape[0]
        return self.loss(self.rows, self.positions, self.shift_labels) / num_predicted

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients and step the optimizer."""
        loss.backward()
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Step the optimizer and drop the gradients."""
        if self.adam is None:
            return
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self.adam.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None
            if master.data_ptr() != parameter.data_ptr():
                parameter.copy_(master)


def prepare_steps(sizes: StepSizes, device: torch.device) -> tuple[list[TrainingStep], dict[str, str]]:
    """Return the contenders, checked, and those that are left out with the reason.

    Raises:
        ModelError: one does not begin as the base, or trains other tensors than those it says.
    """
    base = random_llama(sizes.shape, num_tokens=sizes.num_tokens, dtype=sizes.dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.num_rows, sizes.num_tokens)
    rows = torch.randint(sizes.shape.vocabulary, shape, generator=generator).to(device)
    llamas, left_out = contenders(base, top_layers=sizes.top_layers)
    checked = {
        name: check_contender(name, llama, base, rows[:1, :_CHECKED_TOKENS]) for name, llama in llamas.items()
    }
    return [TrainingStep(name, llamas[name], rows, error) for name, error in checked.items()], left_out


@torch.no_grad()
def untrained_error(llama: LlamaForCausalLM, base: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Return the largest difference between two models' logits, over the largest logit of ``base``."""
    expected, found = (
        model.eval()(input_ids=rows, use_cache=False).logits.float() for model in (base, llama)
    )
    return float((found - expected).abs().max() / expected.abs().max())


def check_contender(name: str, llama: LlamaForCausalLM, base: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Return how far an untrained contender's logits are from the base's; it has made one step after this.

    Raises:
        ModelError: by more than rounding, or gradients reach anything but what is meant to train.
    """
    error, most = untrained_error(llama, base, rows), _MOST_ERROR[base.dtype]
    if not error <= most:
        raise ModelError(
            f"{name}: its logits differ from the base's by {error:.1e} before any training, where {most:.0e} "
            "is rounding; this version computes something else, try another"
        )
    step = TrainingStep(name, llama, rows)
    step.backward(step.forward())  # away from gates and LoRA matrices of 0, which let no gradient through
    step.forward().backward()
    reached = {id(one) for one in llama.parameters() if one.grad is not None and bool(one.grad.any())}
    if reached != {id(one) for one in step.parameters}:
        raise ModelError(
            f"{name}: gradients reach {len(reached)} tensors, {len(step.parameters)} are meant to train; this"
            " version trains something else, try another"
        )
    step.update()
    return error


def estimate_s(steps: list[TrainingStep], sizes: StepSizes, device: torch.device) -> float:
    """Return about how many seconds all measurements take, from one step of plain transformers."""
    plain = [Contender(step.name, step.forward, step.backward) for step in steps if step.name == PLAIN]
    step_ms = time_in_turns(plain, device, repeats=1, warm_up_s=0.0)[PLAIN]["both"].median_ms
    rounds = sizes.repeats + 2  # one to warm up, and one for the peak
    # Over a frozen base a backward pass is as long as a forward pass, so that a second one is half a step.
    return step_ms / 1e3 * rounds * len(steps) * sum(1.5 if one else 1.0 for one in sizes.checkpointing)


def measure_steps(
    steps: list[TrainingStep], sizes: StepSizes, *, is_checkpointed: bool, device: torch.device
) -> StepGroup:
    """Return what a step of each contender costs, all of them in turns."""
    for step in steps:
        step.checkpoint(is_checkpointed)
    in_turns = [Contender(step.name, step.forward, step.backward) for step in steps]
    times = time_in_turns(in_turns, device, repeats=sizes.repeats, warm_up_s=sizes.warm_up_s)
    plain_ms = times[PLAIN]["both"].median_ms
    costs = []
    for step in steps:
        step_ms = times[step.name]["both"].median_ms
        costs.append(
            StepCost(
                step.name,
                sum(parameter.numel() for parameter in step.parameters),
                step.error,
                times[step.name],
                step_ms / plain_ms,
                step.rows.numel() / step_ms * 1e3,
                extra_bytes(lambda step=step: step.backward(step.forward()), device),
            )
        )
    return StepGroup(is_checkpointed, tuple(costs))
