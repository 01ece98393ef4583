"""One cell of a probe, as a process: real optimizer steps of a run, and the most memory that they took.

The rows are one document each, of exactly the length, drawn tokens with every one predicted: the most that
rows of the run's own data can take. Weights are the base's own, as loading them has a peak too.

What a budget counts. On a GPU: all that PyTorch's allocator takes from it, which
``set_per_process_memory_fraction`` caps; CUDA's context is not in it. On the CPU: private memory beyond that
of Python, torch, transformers, DeepSpeed, the process group and DeepSpeed's compiled parts, capped by
RLIMIT_DATA once those are there and nothing of the model is. So it counts weights, adapters, optimizer,
activations, and what the C library keeps between them.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from sparse_llama.config.flags import Overrides
from sparse_llama.config.run import Run, load_run
from sparse_llama.data.batches import Batch
from sparse_llama.data.packing import IGNORED
from sparse_llama.distributed import ranks
from sparse_llama.errors import SparseLlamaError
from sparse_llama.planning.hardware import available_host_bytes
from sparse_llama.planning.probe import CRASHED, FITS, OUT_OF_MEMORY, Figures, Outcome
from sparse_llama.training.engine import optimizer_step
from sparse_llama.training.held import live_bytes
from sparse_llama.training.host_memory import (
    limit_private,
    peak_resident_bytes,
    private_bytes,
    resident_bytes,
)
from sparse_llama.training.libraries import load_libraries
from sparse_llama.training.metrics import write_json
from sparse_llama.training.moment import Moment
from sparse_llama.training.out_of_memory import describe, is_out_of_memory
from sparse_llama.training.session import start_model

_MOST_MICRO_BATCHES = 2
"""Of a measured step: the second meets the first one's gradients, and a third nothing new."""
_MANY = 2**31
"""Steps, where the run's own number depends on its data: more than any warm-up has."""


@dataclass(frozen=True)
class Order:
    """What a process is to measure."""

    config_path: Path | None
    overrides: Overrides
    budget_bytes: int | None
    num_steps: int
    counts_tensors: bool
    results: tuple[Path, ...]
    """Where each rank leaves what it found."""


class Taken(NamedTuple):
    """What some steps took."""

    step_s: float
    """Of one."""
    tensor_bytes: int
    """The most that PyTorch's allocator had given out; 0 on a GPU, or where they are not counted."""
    peak_host_bytes: int


def read_order(file: Path) -> Order:
    """Return what ``planning.probe`` has written into ``file``."""
    found = json.loads(file.read_text(encoding="utf-8"))
    overrides: dict[str, Any] = found["overrides"]
    for name in ("nvme_path", "output_dir"):
        if name in overrides:
            overrides[name] = Path(overrides[name])
    path = found["config_path"]
    return Order(
        None if path is None else Path(path),
        Overrides(**overrides),
        found["budget_bytes"],
        found["num_steps"],
        found["counts_tensors"],
        tuple(map(Path, found["results"])),
    )


def run_cell(order: Order) -> Outcome:
    """Return what the steps of ``order`` take; an error that can be caught is an outcome too."""
    ranks.initialize()
    moment, baseline = Moment("preparing the run"), private_bytes()
    try:
        run = load_run(order.config_path, order.overrides, ranks.world_size(), is_main=False)
        load_libraries(run)
        libraries_bytes, baseline = resident_bytes(), private_bytes()
        apply_budget(order.budget_bytes)
        taken = _train(run, order, moment)
    except Exception as error:
        return failure(error, moment, baseline)
    return Outcome(FITS, figures=figures(taken, libraries_bytes))


def failure(error: Exception, moment: Moment, baseline_bytes: int | None) -> Outcome:
    """Return what came of a cell that ``error`` ended; memory that ran out is told with where."""
    if isinstance(error, SparseLlamaError):
        return Outcome(CRASHED, str(error))
    if is_out_of_memory(error):
        found = describe(
            error, moment, model=None, engine=None, baseline_bytes=baseline_bytes, rank=ranks.rank()
        )
        return Outcome(OUT_OF_MEMORY, f"in the {found.where}: {found.message}")
    return Outcome(CRASHED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def figures(taken: Taken, libraries_bytes: int) -> Figures:
    """Return what this process has taken."""
    on_gpu = ranks.device().type == "cuda"
    return Figures(
        peak_gpu_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
        peak_gpu_reserved_bytes=torch.cuda.max_memory_reserved() if on_gpu else 0,
        peak_host_bytes=taken.peak_host_bytes,
        peak_tensor_bytes=taken.tensor_bytes,
        libraries_bytes=libraries_bytes,
        step_s=taken.step_s,
    )


def apply_budget(budget_bytes: int | None) -> None:
    """Let this process take ``budget_bytes`` more; None is all that there is, which on the CPU needs a limit,
    too: Linux kills a process that goes beyond."""
    device = ranks.device()
    if device.type == "cuda":
        if budget_bytes is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(budget_bytes / total, 1.0), device)
        return
    if private_bytes() is not None:
        share = (available_host_bytes() - resident_bytes()) // ranks.world_size()
        limit_private(share if budget_bytes is None else budget_bytes)


def _train(run: Run, order: Order, moment: Moment) -> Taken:
    """Take the steps; of a shorter accumulation, with the seconds of the run's own."""
    accumulation = min(run.gradient_accumulation_steps, _MOST_MICRO_BATCHES)
    sizes = {
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": run.global_batch_size // run.gradient_accumulation_steps * accumulation,
    }
    shorter = replace(run, deepspeed=run.deepspeed | sizes)
    schedule = None if run.schedule is None else run.schedule.resolve(run.settings.training.steps or _MANY)
    assembled, _, engine = start_model(shorter, schedule)
    batches = [_batch(run, assembled.model.config.vocab_size, index) for index in range(accumulation)]
    engine.train()

    def step(number: int) -> None:
        moment.step = number
        optimizer_step(engine, batches, moment)

    taken = take_steps(step, order.num_steps, live_bytes if order.counts_tensors else None)
    return taken._replace(step_s=taken.step_s / accumulation * run.gradient_accumulation_steps)


def take_steps(step: Callable[[int], object], num_steps: int, held: Callable[[], int] | None) -> Taken:
    """Return what steps take: seconds without the first where there are more, then tensors during one more
    (not on a GPU, whose allocator counts itself).

    Args:
        step: takes one, given its number from 1 on.
        held: returns the bytes of tensors between steps; None leaves tensors uncounted.
    """
    warm_up = 1 if num_steps > 1 else 0
    started_s = _now_s()
    for number in range(1, num_steps + 1):
        if number == warm_up + 1:
            started_s = _now_s()
        step(number)
    step_s = (_now_s() - started_s) / (num_steps - warm_up)
    peak_host_bytes = peak_resident_bytes()  # before there is a profiler, whose record is large
    tensor_bytes = 0
    if held is not None and ranks.device().type == "cpu":
        tensor_bytes = _tensor_bytes(lambda: step(num_steps), held())
    return Taken(step_s, tensor_bytes, peak_host_bytes)


def _tensor_bytes(step: Callable[[], object], before: int) -> int:
    """Return the most that PyTorch's allocator gives out during ``step``, beside ``before``; 0 where there is
    no room for its record."""
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
        results: Any = profiled.profiler
        events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return 0
    now = most = before
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _batch(run: Run, vocab_size: int, index: int) -> Batch:
    """Return this rank's part of rows of one document each."""
    sharing, num_tokens = run.sequence_parallel_size, run.settings.seq_length
    generator = torch.Generator().manual_seed(index * ranks.world_size() + ranks.rank() // sharing)
    ids = torch.randint(vocab_size, (run.micro_batch_size, num_tokens + 1), generator=generator)
    ids, labels = ids[:, :-1], ids[:, 1:].clone()
    labels[:, -1] = IGNORED
    positions = torch.arange(num_tokens).expand_as(ids)
    part = slice(
        num_tokens // sharing * (ranks.rank() % sharing), num_tokens // sharing * (ranks.rank() % sharing + 1)
    )
    return Batch(*(one[:, part].contiguous() for one in (ids, positions, labels)))


def _now_s() -> float:
    if ranks.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Measure what the file on the command line says, and write what was found beside it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("order", type=Path)
    order = read_order(parser.parse_args().order)
    outcome = run_cell(order)
    write_json(order.results[ranks.rank()], asdict(outcome))
    ranks.finalize()
    if not outcome.fits:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
