"""Times that can be compared: the contenders take turns, on the same tensors, in one process.

A machine's clock drifts, and its neighbours come and go: whatever is compared runs A, B, C, A, B, C, ...,
never all of A before all of B. A run is a forward and a backward pass, timed apart.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from sparse_llama.benchmark.efficiency import Pass

Mark = float | torch.cuda.Event
"""Seconds on a CPU, a place in the stream on a GPU."""
_FLUSHED_BYTES = 256 * 2**20  # more than any GPU's L2, so that no run finds its inputs there


@dataclass(frozen=True, eq=False)
class Contender:
    """What is timed; ``backward`` takes what ``forward`` returned, None where there is none to time."""

    name: str
    forward: Callable[[], torch.Tensor]
    backward: Callable[[torch.Tensor], object] | None


@dataclass(frozen=True)
class Timing:
    """Median and quartiles, milliseconds."""

    median_ms: float
    lower_ms: float
    upper_ms: float


Times = dict[Pass, Timing]
"""Without ``backward`` and ``both`` where there is no backward pass. ``both`` is of each run's sum."""


def time_in_turns(
    contenders: list[Contender], device: torch.device, *, repeats: int, warm_up_s: float = 1.0
) -> dict[str, Times]:
    """Return the times of every contender by name, of ``repeats`` rounds.

    Rounds before them, one at least and ``warm_up_s`` long, compile, fill caches, and let clocks settle.
    """
    flush = _flush(device)
    started = time.perf_counter()
    while True:
        for contender in contenders:
            _run(contender, device, flush)
        if time.perf_counter() - started >= warm_up_s:
            break
    samples: dict[str, list[list[float]]] = {contender.name: [] for contender in contenders}
    for _ in range(repeats):
        for contender in contenders:
            samples[contender.name].append(_run(contender, device, flush))
    return {name: _times(runs) for name, runs in samples.items()}


def summarise(samples: list[float]) -> Timing:
    """Return median and quartiles, interpolated linearly between samples."""
    quarters = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    median, lower, upper = torch.tensor(samples, dtype=torch.float64).quantile(quarters).tolist()
    return Timing(median, lower, upper)


def _times(runs: list[list[float]]) -> Times:
    times: Times = {"forward": summarise([run[0] for run in runs])}
    if len(runs[0]) == 2:
        times["backward"] = summarise([run[1] for run in runs])
        times["both"] = summarise([sum(run) for run in runs])
    return times


def _run(contender: Contender, device: torch.device, flush: Callable[[], object]) -> list[float]:
    """Return the milliseconds of a forward pass, and of a backward pass where there is one."""
    flush()
    marks = [_mark(device)]
    output = contender.forward()
    marks.append(_mark(device))
    if contender.backward is not None:
        grads = contender.backward(output)
        marks.append(_mark(device))
        del grads  # freed here and not before: giving memory back is no part of the pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return [_between(first, last) for first, last in pairwise(marks)]


def _mark(device: torch.device) -> Mark:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Mark, last: Mark) -> float:
    """Return milliseconds."""
    if isinstance(first, torch.cuda.Event):
        assert isinstance(last, torch.cuda.Event)
        return first.elapsed_time(last)
    assert not isinstance(last, torch.cuda.Event)
    return (last - first) * 1e3


def _flush(device: torch.device) -> Callable[[], object]:
    """Return what empties the caches before a run; on a CPU the tensors are larger than those."""
    if device.type == "cpu":
        return lambda: None
    return torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device).zero_
