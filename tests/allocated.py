"""The most that a call holds at a time, by the allocator's own events."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the running maximum of what ``call`` allocates on the CPU, over what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    profiler: Any = recorded.profiler
    events = [one for one in profiler.kineto_results.events() if one.name() == "[memory]"]
    assert events, "the profiler has recorded no allocation"
    allocated = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak
