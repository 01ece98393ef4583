"""Masters and moments are the same tensors at every ZeRO stage, and writing them back continues the run to
the bit."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_llama.distributed import ranks
from sparse_llama.training.masters import (
    forget_warm_start,
    read_masters,
    read_moments,
    read_optimizer_step,
    write_masters,
    write_moments,
)

CASES = [
    (0, "fp32", "none"),
    (0, "bf16", "none"),
    (1, "bf16", "none"),
    (2, "fp32", "none"),
    (3, "bf16", "none"),
]
# The CPU optimizer is compiled at first use (half a minute), so offload is exercised in two cases only.
OFFLOAD_CASES = [(2, "bf16", "cpu"), (3, "fp32", "cpu")]


class Regression(nn.Module):
    """A frozen layer under a trainable one, and a gate that starts at zero: the shape of an adapter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(8, 16).requires_grad_(False)
        self.prompt = nn.Linear(16, 5)  # 80 + 5 elements: not a multiple of anything
        self.gate = nn.Parameter(torch.zeros(5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss((self.prompt(torch.tanh(self.frozen(x))) * (1 + self.gate)).float(), y)


def start(stage: int, precision: str, offload: str) -> Any:
    import deepspeed

    ranks.initialize()
    zero: dict[str, Any] = {"stage": stage}
    if offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-2} | ({"torch_adam": True} if offload == "none" else {}),
        },
    }
    model = Regression()
    groups = [
        {"params": [model.prompt.weight], "weight_decay": 0.1},
        {"params": [model.prompt.bias, model.gate], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=copy.deepcopy(config))
    forget_warm_start(engine)
    return engine


def step(engine: Any, number: int) -> list[float]:
    losses = []
    for micro in range(2):
        generator = torch.Generator().manual_seed(2 * number + micro)
        x, y = torch.randn(2, 8, generator=generator), torch.randn(2, 5, generator=generator)
        loss = engine(x.to(engine.module.frozen.weight.dtype), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def trainable(engine: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("stage", "precision", "offload"), CASES + OFFLOAD_CASES)
def test_a_fresh_engine_continues_to_the_bit_from_what_was_read(stage: int, precision: str, offload: str):
    engine = start(stage, precision, offload)
    for number in range(3):
        step(engine, number)
    masters, moments = read_masters(engine, trainable(engine)), read_moments(engine, trainable(engine))
    updates = read_optimizer_step(engine)
    expected = [step(engine, number) for number in (3, 4)]
    final = read_masters(engine, trainable(engine))

    fresh = start(stage, precision, offload)
    write_masters(fresh, trainable(fresh), masters)
    write_moments(fresh, trainable(fresh), moments, updates)
    assert updates == 3
    assert [step(fresh, number) for number in (3, 4)] == expected
    again = read_masters(fresh, trainable(fresh))
    assert all(torch.equal(final[name], again[name]) for name in final)


@pytest.mark.parametrize(("stage", "precision", "offload"), CASES)
def test_every_stage_trains_like_plain_torch(stage: int, precision: str, offload: str):
    """T6: the masters move in fp32 although bf16 could not hold the step; the oracle is a loop of torch
    alone."""
    engine = start(stage, precision, offload)
    for number in range(3):
        step(engine, number)
    masters = read_masters(engine, trainable(engine))

    model = Regression()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.prompt.weight], "weight_decay": 0.1},
            {"params": [model.prompt.bias, model.gate], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    for number in range(3):
        for micro in range(2):
            generator = torch.Generator().manual_seed(2 * number + micro)
            x, y = torch.randn(2, 8, generator=generator), torch.randn(2, 5, generator=generator)
            (model(x, y) / 2).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    # bf16 gradients carry 8 bits: an Adam update of lr x sign differs where a gradient is near zero
    tolerance = 1e-6 if precision == "fp32" else 5e-3
    for name, parameter in trainable(engine).items():
        assert masters[name].shape == getattr(parameter, "ds_shape", parameter.shape)
        expected = dict(model.named_parameters())[name]
        assert torch.allclose(masters[name], expected.detach(), atol=tolerance, rtol=0), name
        assert masters[name].dtype == torch.float32
