"""What PyTorch's own allocator counted while something ran on the CPU."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def running_maximum(profiled: Any) -> int:
    """Return the most that was allocated at once, of all that was allocated while profiling."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most that ``call`` has allocated at once, its results included."""
    gc.collect()  # what others left behind would be released while this is measured
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = call()
    del kept
    return running_maximum(profiled)


def result_bytes(results: Any) -> int:
    """Return the bytes of the tensors in ``results``."""
    storages = {one.untyped_storage().data_ptr(): one for one in results if isinstance(one, torch.Tensor)}
    return sum(one.untyped_storage().nbytes() for one in storages.values())
