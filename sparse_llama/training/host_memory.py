"""What Linux counts of this process: resident memory, and private memory, which RLIMIT_DATA limits.

Private memory (``VmData``) is all that is writable and not shared, touched or not: tensors, the heap, the
stacks of threads, and what the C library keeps after it was freed. Files that are mapped and only read do not
count; nor does a GPU's memory. Beyond the limit an allocation fails with an error that can be caught; without
one Linux kills a process that needs more than there is.
"""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_resident_bytes() -> int:
    """Return the most that was ever resident of this process."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Return what is resident of this process; its peak so far where only that is known."""
    found = _status("VmRSS")
    return peak_resident_bytes() if found is None else found


def private_bytes() -> int | None:
    """Return what of this process counts against RLIMIT_DATA; None where nothing tells."""
    return _status("VmData")


def private_limit_bytes() -> int | None:
    """Return RLIMIT_DATA, as ``ulimit -d`` sets it; None is no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if soft == resource.RLIM_INFINITY else soft


def limit_private(extra_bytes: int) -> None:
    """Let this process have ``extra_bytes`` of private memory more than it has now, and processes that it
    starts as much in all; never raises a limit that is there already."""
    now = private_bytes()
    assert now is not None, "only Linux counts private memory"
    limit, (soft, hard) = now + extra_bytes, resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return next((int(kib) * 1024 for kib in found), None)
