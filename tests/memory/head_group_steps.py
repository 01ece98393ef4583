"""Two optimizer steps of two micro-batches, in head groups under DeepSpeed and plain in torch; run as a
process of its own.

Prints one JSON line per case: losses of both, the largest relative error over all gradients, which tensors
    got none, how often each got one, and of how many layers the weights were whole at a time.
"""

import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger
from memory.tiled_steps import batch, build, configuration, count_gradients, take_steps, train_plainly

from sparse_llama.adapters.attach import first_trained_layer, parameter_groups, trainable_parameters
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.config.settings import MemorySettings
from sparse_llama.distributed import ranks
from sparse_llama.memory.checkpointing import checkpoint_layers
from sparse_llama.memory.gathering import gather_borrowed
from sparse_llama.memory.head_groups import group_heads
from sparse_llama.model.objective import TokenLoss

CHECKPOINTS = {
    "none": None,
    "on the host": ActivationCheckpointing(cpu_checkpointing=True),
    "every second on the host": ActivationCheckpointing(cpu_checkpointing=True, number_checkpoints=2),
}


def run(folder: str, version: str, stage: int, checkpoints: str, is_partitioned: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # nothing stays whole, and nothing is fetched ahead: as small as streaming gets
        names = (
            "param_persistence_threshold",
            "prefetch_bucket_size",
            "max_live_parameters",
            "max_reuse_distance",
        )
        zero |= {f"stage3_{name}": 0 for name in names}
    config = configuration(zero)
    expected_losses, expected_gradients = train_plainly(build(folder, version))
    model = build(folder, version, zero3_config=config if is_partitioned else None)
    group_heads(model, MemorySettings(head_groups=2, mlp_tile=4))
    checkpoint_layers(model, CHECKPOINTS[checkpoints], first_trained_layer(model))
    objective = TokenLoss(model)
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=0.0), lr=0.1)
    engine: Any
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    gather_borrowed(objective)
    parameters = dict(trainable_parameters(model))
    counts = count_gradients(parameters)
    with torch.no_grad():  # as a run looks at its first logits, and as it generates
        model(input_ids=batch(0, 3)["input_ids"], use_cache=False)
        model(input_ids=batch(0, 3)["input_ids"], use_cache=True)
    whole: list[int] = []
    found = take_steps(engine, parameters, expected_gradients, lambda: watch_backward(model, whole))
    result = found | {
        "expected_losses": expected_losses,
        "times_written": sorted(set(counts.values())),
        "most_whole_layers": max(whole, default=0),
        "whole_after": num_whole_layers(model),
    }
    engine.destroy()
    return result


def num_whole_layers(model: torch.nn.Module) -> int:
    """Return of how many layers this rank holds more than its part."""
    layers: Any = model.model.layers  # type: ignore[union-attr]
    return sum(layer.mlp.up_proj.weight.numel() > 0 for layer in layers)


def watch_backward(model: torch.nn.Module, found: list[int]) -> torch.autograd.graph.saved_tensors_hooks:
    """Note how many layers are whole whenever a layer's backward pass asks for its input."""

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        found.append(num_whole_layers(model))
        return tensor

    keep: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # noqa: E731
    return torch.autograd.graph.saved_tensors_hooks(keep, unpack)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    ranks.initialize()
    for case in json.loads(sys.argv[1]):
        with Path(sys.argv[2]).open("a") as file:
            file.write(json.dumps(run(**case)) + "\n")
    ranks.finalize()
