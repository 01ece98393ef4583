"""The DeepSpeed engine of a run: optimizer groups, schedule, one optimizer step over token-weighted
micro-batches."""

import copy
import logging
import math
import warnings
from typing import Any

import torch
from torch import nn

from sparse_llama.adapters.attach import parameter_groups
from sparse_llama.config.run import Run
from sparse_llama.config.schedule import Schedule, learning_rate
from sparse_llama.data.batches import Batch
from sparse_llama.distributed.ops import load_op
from sparse_llama.distributed.ranks import all_reduce_sum, device, world_size
from sparse_llama.errors import ConfigError
from sparse_llama.memory.gathering import gather_borrowed
from sparse_llama.training.libraries import ops_of
from sparse_llama.training.masters import forget_warm_start
from sparse_llama.training.moment import BACKWARD, FORWARD, UPDATE, Moment

MONITOR_BLOCKS = ("tensorboard", "wandb", "csv_monitor", "comet")


def start_engine(run: Run, objective: nn.Module, llama: nn.Module, schedule: Schedule | None) -> Any:
    """Return ``deepspeed.initialize``'s engine around ``objective``, which holds ``llama``.

    Only the adapter's parameters are given to the optimizer: the frozen base has no gradients and no
    optimizer state.

    Raises:
        ConfigError: the optimizer does not run on this device.
        BuildError: an op that the run needs cannot be built here.
    """
    import deepspeed

    quiet_libraries()
    _check_optimizer(run)
    config = engine_config(run)
    parameters = config["optimizer"]["params"]
    if (
        run.offload != "cpu"
        and run.offload != "nvme"
        and config["optimizer"]["type"].lower() in ("adam", "adamw")
    ):
        # Adapters are a thousandth of the model: torch's own AdamW costs nothing beside the model's matrix
        # products and needs no compiler; DeepSpeed's fused one is built from source at first use.
        parameters.setdefault("torch_adam", True)
    for name in ops_of(run):
        load_op(
            name
        )  # before DeepSpeed does, which waits for a lock for ever, and has many words for a failure
    groups: Any = parameter_groups(llama, weight_decay=parameters.get("weight_decay", 0.0))
    num_trained = sum(count_elements(one) for group in groups for one in group["params"])
    config["zero_optimization"].setdefault("reduce_bucket_size", num_trained)
    engine, *_ = deepspeed.initialize(
        model=objective,
        model_parameters=groups,
        config=config,
        lr_scheduler=None if schedule is None else _scheduler_factory(schedule, base_lr=parameters["lr"]),
    )
    gather_borrowed(objective)
    forget_warm_start(engine)
    return engine


def engine_config(run: Run) -> dict[str, Any]:
    """Return what DeepSpeed is given of a run's document.

    Ranks that share rows are data-parallel ranks to DeepSpeed, as each has a part of a step's tokens: then
    one factor, that of ``optimizer_step``, is right with and without sequence parallelism, and a batch is
    micro-batch x accumulation x processes. Given groups (``mpu``), DeepSpeed 0.19.8 divides gradients by the
    number of groups instead, but by that of processes where ``gradient_predivide_factor`` happens to be that
    (``stage_1_and_2.py``, ``average_tensor``). What it does beside, summing gradients in fp32, is set here.
    """
    config = copy.deepcopy(run.deepspeed)
    if config["zero_optimization"].get("reduce_bucket_size") == "auto":
        del config["zero_optimization"]["reduce_bucket_size"]  # start_engine knows what trains
    for block in MONITOR_BLOCKS:  # ours to drive: training/metrics.py says why
        config.pop(block, None)
    sharing = config.pop("sequence_parallel_size", 1)
    if sharing > 1:
        config["train_batch_size"] *= sharing
        config["communication_data_type"] = config.pop("seq_parallel_communication_data_type", "fp32")
    return config


def count_elements(parameter: nn.Parameter) -> int:
    """Return the elements of the whole parameter, also where ZeRO-3 has left this rank a part of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _check_optimizer(run: Run) -> None:
    if run.deepspeed["optimizer"]["type"] == "Lion" and device().type == "cpu" and run.offload == "none":
        raise ConfigError(
            "optimizer.type: DeepSpeed's Lion needs a GPU, or to be offloaded; use AdamW, or "
            "ZeRO stage 1 to 3 with --offload cpu"
        )


def quiet_libraries() -> None:
    """Keep DeepSpeed's and torch's chatter out of the run's output: warnings stay, progress notes go."""
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def optimizer_step(
    engine: Any, micro_batches: list[Batch], moment: Moment | None = None
) -> tuple[float, int]:
    """Make one optimizer step; return the loss summed over the labelled tokens of all ranks, and their count.

    Every labelled token of the global batch weighs the same, whichever micro-batch or rank it is in:
    DeepSpeed averages over micro-batches and ranks, so each micro-batch's *sum* is multiplied by their number
    over the count. A rank that holds a part of its rows' tokens sums over these.
    """
    count = torch.tensor(
        sum(batch.num_labelled for batch in micro_batches), dtype=torch.int64, device=device()
    )
    total = int(all_reduce_sum(count))
    weight = len(micro_batches) * world_size() / max(total, 1)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device())
    moment = Moment() if moment is None else moment
    moment.losses.clear()
    for batch in micro_batches:
        moment.enter(FORWARD, batch)
        loss = engine(**batch.to(device()))
        loss_sum += loss.detach()
        moment.losses.append(loss.detach())
        moment.enter(BACKWARD, batch)
        engine.backward(loss * weight)
        moment.enter(UPDATE, batch)
        engine.step()
    return float(all_reduce_sum(loss_sum)), total


def gradient_norm(engine: Any) -> float:
    """Return the global gradient norm of the last step, before clipping; NaN where DeepSpeed does not compute
    it."""
    norm = engine.get_global_grad_norm()
    return math.nan if norm is None else float(norm)


def _scheduler_factory(schedule: Schedule, base_lr: float) -> Any:
    def make(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        # The scheduler counts finished steps from 0, the schedule steps from 1: the first step's lr is never
        # 0.
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: learning_rate(schedule, done + 1) / base_lr
        )

    return make
