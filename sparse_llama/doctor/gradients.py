"""Are the gradients right, of the very code that a run on this machine would go through?

Kernels have shipped with silently wrong gradients, and a wrong one trains: to a worse adapter. So a small
LLaMA is put together as a run's is, on the device of a run, and its gradients are compared with

- those of ``plain_llama``, the formulas written out and differentiated by autograd, in fp64;
- on a CPU, where all of it computes in fp64, a difference of its own loss along a random direction, too.

In fp64 nothing but the order of sums differs, 1e-14 of a tensor's norm, and a dropped term is 1e-3 or more:
the bound is 1e-9. GPU kernels compute in fp32 and bf16. There the plain evaluation in the same format says
what rounding costs, and an exact kernel, which sums in another order, is off by 0.5 to 2.5 times as much
(measured). Allowed is ten times as much in fp32, which is still a hundredth of a dropped term, and three
times in 16 bits.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.attention.core import attend
from sparse_llama.attention.dispatch import make_core
from sparse_llama.attention.documents import find_documents
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.distributed.ranks import device
from sparse_llama.doctor import plain_llama
from sparse_llama.doctor.findings import Finding
from sparse_llama.doctor.small_llama import (
    BLOCK,
    DOCUMENTS,
    NUM_TOKENS,
    SPARSITY,
    Variant,
    build_small_llama,
    draw_batch,
    position_ids,
    visible,
)
from sparse_llama.layouts import build_layout
from sparse_llama.model.objective import TokenLoss

FP64_BOUND = 1e-9
"""Of a tensor's L2 norm."""
DIFFERENCES_BOUND = 1e-6
"""Of the derivative along a direction: a fourth-order difference with a step of 1e-3 reaches about 1e-9."""
SLACK = {torch.float32: 10.0, torch.bfloat16: 3.0, torch.float16: 3.0}
"""Times what the plain evaluation in the same format is off."""
FACTOR = 0.37
"""By which the loss is multiplied before it is differentiated, as accumulation and loss scaling do: with 1, a
backward pass that forgets the incoming gradient would look right."""
_STEP = 1e-3
_MEMORY = {"loss_tile": 37, "mlp_tile": 40, "norm_tile": 40}  # ragged: none divides the 416 tokens
VARIANTS: dict[str, Variant] = {
    "adapter v1": Variant("v1"),
    "adapter v2": Variant(),
    "tiled loss": Variant(memory={"loss_tile": 37}),
    "tiled MLP and norms": Variant(memory={"mlp_tile": 40, "norm_tile": 40}),
    "head groups": Variant(memory={"head_groups": 2, "mlp_tile": 40}),
    "checkpointing": Variant(is_checkpointed=True),
    "all of them, v1": Variant("v1", {**_MEMORY, "head_groups": 2}, is_checkpointed=True),
    "all of them, v2": Variant("v2", {**_MEMORY, "head_groups": 2}, is_checkpointed=True),
}
ATTENTION = "attention"
_LAYOUTS: tuple[dict[str, Any], ...] = (
    SPARSITY,
    {"mode": "fixed", "num_local_blocks": 4, "different_layout_per_head": True}
    | {"num_different_global_patterns": 4},
    {"mode": "bigbird", "num_random_blocks": 1, "different_layout_per_head": True},
)
Gradients = dict[str, Tensor]
"""By name, and the loss or the output beside them."""


@dataclass(frozen=True)
class Error:
    """The largest deviation of a comparison, against what it may be."""

    name: str
    """Of the tensor."""
    error: float
    """Of its norm."""
    bound: float

    @property
    def is_within(self) -> bool:
        """Whether it is a number, and small enough."""
        return self.severity <= 1.0

    @property
    def severity(self) -> float:
        """The error in units of its bound; infinite where it is no number."""
        return math.inf if math.isnan(self.error) else self.error / self.bound

    def __str__(self) -> str:
        return f"{self.error:.0e} (of {self.bound:.0e} allowed)"


def check_gradients(name: str) -> Finding:
    """Return what came of one path: ``ATTENTION``, or one of ``VARIANTS``."""
    told: list[str] = []
    wrong: list[str] = []
    for dtype in formats():
        errors = _check_attention(dtype) if name == ATTENTION else _check_variant(VARIANTS[name], dtype)
        for label, error in errors.items():
            told.append(f"{error} {label}")
            wrong += [] if error.is_within else [f"{error.name} is off by {error} {label}"]
    if not wrong:
        return Finding(name, "ok", f"off by {', '.join(told)}")
    advice = "results from this machine would be wrong: do not train here; report this with the text below"
    return Finding(name, "fail", "; ".join(wrong), advice)


def formats() -> tuple[torch.dtype, ...]:
    """Return what the paths are checked in: what the kernels of a run's device compute in."""
    if device().type == "cpu":
        return (torch.float64,)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return (torch.float32, torch.bfloat16 if has_bf16 else torch.float16)


def _check_variant(variant: Variant, dtype: torch.dtype) -> dict[str, Error]:
    objective = build_small_llama(variant, dtype)
    batch = draw_batch(objective)
    found = _own_gradients(objective, batch)
    exact = _plain_gradients(objective, batch, torch.float64)
    plain = None if dtype == torch.float64 else _plain_gradients(objective, batch, dtype)
    errors = {_label(dtype): compare(found, exact, plain, SLACK.get(dtype, 1.0))}
    if dtype == torch.float64:
        errors["by differences"] = _compare_differences(objective, batch, found)
    return errors


def _own_gradients(objective: TokenLoss, batch: plain_llama.Batch) -> Gradients:
    trained = trainable_parameters(objective.llama)
    loss = _loss(objective, batch)
    grads = torch.autograd.grad(loss * FACTOR, [parameter for _, parameter in trained])
    return {"the loss": loss.detach()} | dict(zip((name for name, _ in trained), grads, strict=True))


def _plain_gradients(objective: TokenLoss, batch: plain_llama.Batch, dtype: torch.dtype) -> Gradients:
    """Return the same by the formulas in ``dtype``, from the same weights."""
    trained = [name for name, _ in trainable_parameters(objective.llama)]
    weights = {
        name: parameter.detach().to(dtype, copy=True).requires_grad_(name in trained)
        for name, parameter in objective.llama.named_parameters()
    }
    loss = plain_llama.summed_loss(weights, objective.llama.config, batch)
    grads = torch.autograd.grad(loss * FACTOR, [weights[name] for name in trained])
    return {"the loss": loss.detach()} | dict(zip(trained, grads, strict=True))


def compare(found: Gradients, exact: Gradients, plain: Gradients | None, slack: float = 1.0) -> Error:
    """Return the error of ``found`` that is largest against its bound.

    Args:
        exact: in fp64.
        plain: by the formulas in the format of ``found``, whose own error is the measure; None where that
            is fp64.
        slack: times that error that is allowed.
    """
    errors = {name: _distance(found[name], exact[name]) for name in exact}
    bounds = dict.fromkeys(exact, FP64_BOUND)
    if plain is not None:
        # of a tensor of four gates the plain evaluation may be off by little, by chance
        whole = _norm(plain[name].double() - exact[name] for name in exact) / _norm(exact.values())
        bounds = {name: slack * max(_distance(plain[name], exact[name]), whole) for name in exact}
    every = (Error(name, errors[name], bounds[name]) for name in exact)
    return max(every, key=lambda one: one.severity)


def _compare_differences(objective: TokenLoss, batch: plain_llama.Batch, found: Gradients) -> Error:
    """Return how far the derivative along a random direction is from a difference of the loss."""
    trained = trainable_parameters(objective.llama)
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for _, one in trained]
    length = _norm(drawn)
    direction = {name: one / length for (name, _), one in zip(trained, drawn, strict=True)}
    slope = sum(float((found[name] * one).sum()) for name, one in direction.items())
    measured = _slope(lambda: FACTOR * float(_loss(objective, batch)), trained, direction)
    return Error("the derivative along a direction", abs(measured - slope) / abs(slope), DIFFERENCES_BOUND)


def _slope(
    loss: Callable[[], float], trained: list[tuple[str, nn.Parameter]], direction: dict[str, Tensor]
) -> float:
    """Return (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h: the derivative but for O(h^4)."""
    starts = {name: parameter.detach().clone() for name, parameter in trained}

    def at(step: float) -> float:
        for name, parameter in trained:
            parameter.data.copy_(starts[name] + step * direction[name])
        return loss()

    with torch.no_grad():
        near, far = at(_STEP) - at(-_STEP), at(2 * _STEP) - at(-2 * _STEP)
        at(0.0)
    return (8 * near - far) / (12 * _STEP)


def _loss(objective: TokenLoss, batch: plain_llama.Batch) -> Tensor:
    return objective(input_ids=batch.input_ids, position_ids=batch.position_ids, shift_labels=batch.labels)


def _check_attention(dtype: torch.dtype) -> dict[str, Error]:
    """Compare the core that a run would be given, alone, under several layouts."""
    checked = [_check_layout(options, dtype) for options in _LAYOUTS]
    worst, name = max(checked, key=lambda one: one[0].severity)
    return {f"{_label(dtype)}, {name}": worst}


def _check_layout(options: dict[str, Any], dtype: torch.dtype) -> tuple[Error, str]:
    where, scaling = device(), 0.25
    sparsity = parse_sparsity(options | {"block": BLOCK})
    layout = build_layout(sparsity, num_heads=4, num_blocks=NUM_TOKENS // BLOCK, seed=0)
    sees = visible(layout).to(where)
    *inputs, grad = (tensor.to(where, dtype) for tensor in _draw())
    documents = find_documents(position_ids(), len(DOCUMENTS))
    core = make_core(layout, documents, inputs[0], scaling=scaling)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> Gradients:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
        output = function(*leaves)
        grads = torch.autograd.grad(output, leaves, grad.to(dtype))
        names = (f"the gradient of {one} ({options['mode']})" for one in ("query", "key", "value"))
        return {f"the output ({options['mode']})": output.detach()} | dict(zip(names, grads, strict=True))

    def plainly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return plain_llama.attend(query, key, value, sees, scaling)

    found = run(lambda *leaves: attend(core, *leaves), dtype)
    plain = None if dtype == torch.float64 else run(plainly, dtype)
    error = compare(found, run(plainly, torch.float64), plain, SLACK.get(dtype, 1.0))
    return error, type(core).__name__.removesuffix("Core").lower()


def _draw() -> Iterator[Tensor]:
    """Yield query, key, value and the output's gradient, fp64."""
    generator = torch.Generator().manual_seed(4)
    for num_heads in (4, 2, 2, 4):
        shape = (len(DOCUMENTS), num_heads, NUM_TOKENS, 16)
        yield torch.randn(shape, generator=generator, dtype=torch.float64)


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _norm(tensors: Any) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors)) ** 0.5


def _label(dtype: torch.dtype) -> str:
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return f"in {names[dtype]}"
