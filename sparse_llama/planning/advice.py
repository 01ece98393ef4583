"""What would fit where memory has just run out: the plan, corrected by what was measured."""

import re
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from transformers import LlamaConfig

from sparse_llama.config.run import Run
from sparse_llama.planning.estimate import Estimate, estimate
from sparse_llama.planning.hardware import GPU_RESERVE_BYTES, Hardware, drive_of, this_machine
from sparse_llama.planning.quick import Change, smallest_changes
from sparse_llama.training.held import LIBRARIES
from sparse_llama.training.moment import FORWARD
from sparse_llama.training.out_of_memory import Shortage


@dataclass(frozen=True)
class Advice:
    """The plan of a run that ran out of memory, and what would fit."""

    planned: Estimate
    changes: tuple[Change, ...]
    """Smallest first."""


def advise_apart(run: Run, config: LlamaConfig, shortage: Shortage, ranks: int = 1) -> Advice:
    """Return ``advise`` of a process of its own: this one may have no memory left to plan in, not even for
    the stack of a thread (which is why it is no executor's), and whatever goes wrong there does not hide what
    has gone wrong here.

    Raises:
        Exception: what went wrong there.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    asked = (run, config, this_machine(drive_of(run)), shortage, ranks)
    process = context.Process(target=_send_advice, args=(sender, *asked))
    process.start()
    sender.close()  # or nobody would notice that the process has ended
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that plans ended with status {process.exitcode}") from None
    process.join()
    if isinstance(found, Exception):
        raise found
    return found


def _send_advice(sender: Connection, *asked: Any) -> None:
    try:
        sender.send(advise(*asked))
    except Exception as error:
        sender.send(RuntimeError(f"{type(error).__name__}: {error}"))


def advise(run: Run, config: LlamaConfig, hardware: Hardware, shortage: Shortage, ranks: int = 1) -> Advice:
    """Return the plan of ``run`` for the batch that did not fit, and the changes with which it would."""
    batch, device = shortage.batch, "cuda" if shortage.place == "gpu" else hardware.device
    planned = estimate(
        run,
        config,
        device=device,
        ranks=ranks,
        num_tokens=None if batch is None else batch.num_tokens,
        micro_batch_size=None if batch is None else batch.num_rows,
        num_labelled=None if batch is None else batch.num_labelled,
    )
    left = corrected(hardware, run, config.num_hidden_layers, shortage, planned)
    return Advice(planned, tuple(smallest_changes(run, config, left, ranks)))


def corrected(
    hardware: Hardware, run: Run, num_layers: int, shortage: Shortage, planned: Estimate
) -> Hardware:
    """Return ``hardware`` with as much less memory as the run took more than was planned.

    A run that was planned to need P bytes by then, and failed when it held H and asked for A, needs
    (H + A) / P times its plan, or more. What fits the limit L is then a plan of L P / (H + A). All of them
    without what the process holds before it has a model, which no setting changes.
    """
    place = shortage.place
    on_gpu = place == "gpu"
    own = GPU_RESERVE_BYTES if on_gpu else shortage.held.get(LIBRARIES, 0)
    needed = max(shortage.held_bytes + (shortage.asked_bytes or 0) - own, 1)
    limit = max((shortage.limit_bytes or shortage.held_bytes) - own, 0)
    most = planned.run_bytes[place]
    excess = max(needed / max(most * _share_done(run, num_layers, shortage), 1), 1.0)
    usable = min(int(min(limit, needed) / excess), most - 1)
    if on_gpu:
        return replace(hardware, gpu_bytes=usable + GPU_RESERVE_BYTES)
    return replace(hardware, host_bytes=usable + planned.peak_bytes[place] - most)


def _share_done(run: Run, num_layers: int, shortage: Shortage) -> float:
    """Return which part of the planned peak had built up: a forward pass that keeps everything adds the same
    with every layer, what came before the first being small beside it."""
    keeps = run.checkpointing is None and run.settings.memory.num_head_groups is None
    layer = re.match(r"model\.layers\.(\d+)", shortage.module or "")
    if shortage.phase != FORWARD or not keeps or layer is None:
        return 1.0
    return (int(layer[1]) + 1) / num_layers
