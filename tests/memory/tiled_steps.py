"""Two optimizer steps of two micro-batches, tiled under DeepSpeed and untiled in plain torch; run as a
process of its own.

Prints one JSON line per case: losses of both, the largest relative error over all gradients, and how often
    each tensor got its gradient.
"""

import copy
import json
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
from sparse_llama.memory.tiles import tile_layers
from sparse_llama.model.llama import load_llama
from sparse_llama.model.objective import TokenLoss

TILES = MemorySettings(loss_tile=4, mlp_tile=5, norm_tile=7)  # of 18 tokens, of which 12 or 6 are labelled
NUM_LABELLED = 18


def build(folder, version, *, zero3_config=None, is_checkpointed=False):
    model = load_llama(folder, dtype=torch.float32, zero3_config=zero3_config).model
    attach_adapters(model, AdapterSettings(version=version, prompt_length=3, start_layer=1), seed=1)
    checkpointing = ActivationCheckpointing() if is_checkpointed else None
    checkpoint_layers(model, checkpointing, first_trained_layer(model))
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


def train_plainly(model):
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


def run(folder, version, stage, is_checkpointed, is_partitioned) -> dict:
    zero = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # or every parameter of a tiny model stays whole
    config = configuration(zero)
    expected_losses, expected_gradients = train_plainly(build(folder, version))
    zero3_config = config if is_partitioned else None
    model = build(folder, version, zero3_config=zero3_config, is_checkpointed=is_checkpointed)
    tile_layers(model, TILES)
    objective = TokenLoss(model, loss_tile=TILES.loss_tile)
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=0.0), lr=0.1)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    gather_borrowed(objective)
    parameters = dict(trainable_parameters(model))
    counts = count_gradients(parameters)
    with torch.no_grad():  # as a run looks at its first logits and loss, outside of the engine
        model(input_ids=batch(0, 3)["input_ids"], use_cache=False)
        objective(**batch(0, 3))
    found = take_steps(engine, parameters, expected_gradients)
    engine.destroy()
    return found | {
        "expected_losses": expected_losses,
        "times_written": sorted(set(counts.values())),
    }


def take_steps(
    engine: Any,
    parameters: dict[str, torch.nn.Parameter],
    expected_gradients: list[dict[str, torch.Tensor]],
    watching: Callable[[], AbstractContextManager[Any]] = nullcontext,
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


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    ranks.initialize()
    for case in json.loads(sys.argv[1]):
        with Path(sys.argv[2]).open("a") as file:
            file.write(json.dumps(run(**case)) + "\n")
    ranks.finalize()
