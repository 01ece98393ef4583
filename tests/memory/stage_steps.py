"""Two optimizer steps of two micro-batches, with levers under DeepSpeed and plain in torch; run as a process
of its own.

Prints one JSON line per case: losses of both, the largest relative error over all gradients, which tensors
got none, how often each got one, and of how many layers the weights were whole at a time.
"""

import copy
import json
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from adapted_models import shifted
from deepspeed.utils import logger, safe_get_full_grad

from sparse_llama.adapters.attach import (
    attach_adapters,
    first_trained_layer,
    parameter_groups,
    trainable_parameters,
)
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.config.settings import AdapterSettings, MemorySettings
from sparse_llama.distributed import ranks
from sparse_llama.memory.checkpointing import checkpoint_layers
from sparse_llama.memory.gathering import gather_borrowed
from sparse_llama.memory.head_groups import group_heads
from sparse_llama.memory.tiles import tile_layers
from sparse_llama.model.llama import load_llama
from sparse_llama.model.objective import TokenLoss

LEVERS = {  # of 18 tokens, of which 12 or 6 are labelled
    "tiles": MemorySettings(loss_tile=4, mlp_tile=5, norm_tile=7),
    "head groups": MemorySettings(head_groups=2, mlp_tile=4),
}
CHECKPOINTS = {
    "none": None,
    "every": ActivationCheckpointing(),
    "on the host": ActivationCheckpointing(cpu_checkpointing=True),
    "every second on the host": ActivationCheckpointing(cpu_checkpointing=True, number_checkpoints=2),
}
NUM_LABELLED = 18
STAGE_3 = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
"""At 0 nothing stays whole, and nothing is fetched ahead: as small as streaming gets."""


def build(folder: str, version: str, *, zero3_config: dict[str, Any] | None = None) -> Any:
    model = load_llama(folder, dtype=torch.float32, zero3_config=zero3_config).model
    attach_adapters(model, AdapterSettings(version=version, prompt_length=3, start_layer=1), seed=1)
    for name, parameter in trainable_parameters(model):  # at gate 0 a prompt has no gradient
        if name.endswith("zero_init.gate"):
            parameter.data.fill_(0.5)
    return model.train()


def micro_batches(step: int) -> list[dict[str, torch.Tensor]]:
    """Return two, of 12 and 6 labelled tokens: a gradient that forgets its factor is wrong."""
    return [batch(2 * step, prompt_length=3), batch(2 * step + 1, prompt_length=6)]


def batch(seed: int, prompt_length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(seed))
    labels = ids.masked_fill(torch.arange(9) < prompt_length, -100)
    return {"input_ids": ids, "position_ids": torch.arange(9).expand(2, 9), "shift_labels": shifted(labels)}


def train_plainly(model: Any) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=0.0), lr=0.1)
    losses, gradients = [], []
    for step in range(2):
        optimizer.zero_grad()
        loss = sum((TokenLoss(model)(**one) for one in micro_batches(step)), torch.zeros(())) / NUM_LABELLED
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: copy.copy(one.grad) for name, one in trainable_parameters(model)})
        optimizer.step()
    return losses, gradients


def configuration(zero: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's, for plain SGD: its default clips gradients."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }


def run(
    levers: str, folder: str, version: str, stage: int, checkpoints: str, is_partitioned: bool
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {f"stage3_{name}": 0 for name in STAGE_3}
    config = configuration(zero)
    expected_losses, expected_gradients = train_plainly(build(folder, version))
    model = build(folder, version, zero3_config=config if is_partitioned else None)
    memory = LEVERS[levers]
    if memory.num_head_groups is not None:
        group_heads(model, memory)
    checkpoint_layers(model, CHECKPOINTS[checkpoints], first_trained_layer(model))
    if memory.num_head_groups is None:
        tile_layers(model, memory)
    objective = TokenLoss(model, loss_tile=memory.loss_tile)
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=0.0), lr=0.1)
    engine: Any
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    gather_borrowed(objective)
    parameters = dict(trainable_parameters(model))
    counts = count_gradients(parameters)
    with torch.no_grad():  # outside of the engine, as a run looks at its first logits and loss, and generates
        model(input_ids=batch(0, 3)["input_ids"], use_cache=False)
        model(input_ids=batch(0, 3)["input_ids"], use_cache=True)
        objective(**batch(0, 3))
    whole: list[int] = []
    found = take_steps(engine, parameters, expected_gradients, lambda: watch_backward(model, whole))
    found |= {
        "expected_losses": expected_losses,
        "times_written": sorted(set(counts.values())),
        "most_whole_layers": max(whole, default=0),
        "whole_after": num_whole_layers(model),
    }
    engine.destroy()
    return found


def take_steps(
    engine: Any,
    parameters: dict[str, torch.nn.Parameter],
    expected_gradients: list[dict[str, torch.Tensor]],
    watching: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Any]:
    """Take two steps of two micro-batches, each within ``watching``; return their losses, and how their
    gradients compare."""
    losses, missing, worst = [], [], 0.0
    for step in range(2):
        losses.append(0.0)
        for index, one in enumerate(micro_batches(step)):
            with watching():
                loss = engine(**one) / NUM_LABELLED
                engine.backward(loss * 2)  # DeepSpeed divides by the number of micro-batches
            losses[-1] += loss.item()
            if index == 1:
                for name, parameter in parameters.items():
                    gradient = safe_get_full_grad(parameter)
                    if gradient is None or not gradient.any():
                        missing.append(name)
                        continue
                    expected = expected_gradients[step][name]
                    worst = max(worst, float((gradient - expected).norm() / expected.norm()))
            engine.step()
    return {"losses": losses, "worst_gradient": worst, "without_gradient": missing}


def count_gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, int]:
    """Return how often each parameter gets a gradient from now on: each time ZeRO reduces it."""
    counts = dict.fromkeys(parameters, 0)
    for name, parameter in parameters.items():

        def count(_: object, name: str = name) -> None:
            counts[name] += 1

        parameter.register_post_accumulate_grad_hook(count)
    return counts


def num_whole_layers(model: Any) -> int:
    """Return of how many layers this rank holds more than its part."""
    return sum(layer.mlp.up_proj.weight.numel() > 0 for layer in model.model.layers)


def watch_backward(model: Any, found: list[int]) -> torch.autograd.graph.saved_tensors_hooks:
    """Note how many layers are whole whenever a layer's backward pass asks for its input."""

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        found.append(num_whole_layers(model))
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    ranks.initialize()
    for case in json.loads(sys.argv[1]):
        with Path(sys.argv[2]).open("a") as file:
            file.write(json.dumps(run(**case)) + "\n")
    ranks.finalize()
