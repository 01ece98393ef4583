"""How much memory a call needs at its worst, beyond what is there before it."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak of memory that ``call`` adds, its results included; None where nothing measures it.

    On a GPU what PyTorch allocates; on Linux resident memory, whose peak the kernel counts anew when told to.
    ``call`` should have run before: a first one loads and compiles.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    try:
        # Freed memory that the C library keeps is resident; a call would take it unseen.
        ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")
    except (AttributeError, OSError):  # another C library; a kernel or a container that forbids it
        return None
    before = _resident_bytes("VmRSS")
    call()
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(name: str) -> int:
    """Return ``VmRSS``, what is resident now, or ``VmHWM``, its peak."""
    lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
    (found,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(found.split()[1]) * 1024
