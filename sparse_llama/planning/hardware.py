"""What a run may use: of a GPU, of the host, of a drive. Given by the user, or what this machine has."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sparse_llama.config.paths import exists, expand
from sparse_llama.config.run import Run
from sparse_llama.distributed.ranks import device
from sparse_llama.training.host_memory import private_bytes, private_limit_bytes, resident_bytes

GIB = 2**30
GPU_RESERVE_BYTES = 3 * GIB // 2
"""Of a GPU, what no plan counts: CUDA's context and libraries (about 0.5 GiB), cuBLAS' workspaces, and what
PyTorch's allocator cannot use between its blocks. 38.5 of 40 GiB are left to plan with."""
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Hardware:
    """The budgets of one machine, bytes."""

    gpu_bytes: int | None
    """Of each GPU; None where the run computes on the CPU."""
    host_bytes: int
    """Of host memory, for all processes of the run together."""
    disk_bytes: int | None = None
    """Free where the run offloads to; None is not known, and not checked."""
    is_this_machine: bool = False

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        return "cpu" if self.gpu_bytes is None else "cuda"

    def usable_bytes(self, place: str) -> int | None:
        """Return what a plan may fill of ``gpu``, ``host`` or ``disk``; None is no limit."""
        if place == "gpu":
            return None if self.gpu_bytes is None else max(self.gpu_bytes - GPU_RESERVE_BYTES, 0)
        return self.host_bytes if place == "host" else self.disk_bytes


def this_machine(folder: str | None = None) -> Hardware:
    """Return what is free for a run on this machine, in this process and those beside it.

    Args:
        folder: that the run offloads to (``drive_of``); None is none.
    """
    where = device()
    gpu_bytes = None if where.type == "cpu" else torch.cuda.get_device_properties(where).total_memory
    return Hardware(gpu_bytes, available_host_bytes(), _free_disk_bytes(folder), is_this_machine=True)


def drive_of(run: Run) -> str | None:
    """Return the folder that the run offloads to; None where it does not."""
    zero = run.deepspeed["zero_optimization"]
    folders = [run.settings.memory.checkpoint_nvme_path]
    folders += [zero.get(name, {}).get("nvme_path") for name in ("offload_param", "offload_optimizer")]
    return next((folder for folder in folders if folder), None)


def available_host_bytes() -> int:
    """Return the host memory that this process can have in all, what it has already included.

    The least of what Linux calls available, what is left in this process' control group (a container's
    limit), and what is left under RLIMIT_DATA.
    """
    left = [_meminfo("MemAvailable"), *_left_in_cgroups(), _left_private()]
    known = [count for count in left if count is not None]
    if not known:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return resident_bytes() + min(known)


def _left_private() -> int | None:
    limit, private = private_limit_bytes(), private_bytes()
    return None if limit is None or private is None else max(limit - private, 0)


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return next((int(kib) * 1024 for kib in found), None)


def _left_in_cgroups() -> Iterator[int]:
    """Yield what the control groups of this process leave it: version 2's at the root that a container sees,
    and version 1's. File pages that the kernel would drop count as free, as in MemAvailable."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, taken = (int((_CGROUPS / name).read_text()) for name in (limit, used))
            stat = (_CGROUPS / limit).with_name("memory.stat").read_text()
        except (OSError, ValueError):  # no such version, or the limit is the word "max"
            continue
        droppable = dict(line.split() for line in stat.splitlines()).get(cached, "0")
        yield max(most - taken + int(droppable), 0)


def _free_disk_bytes(folder: str | None) -> int | None:
    if folder is None:
        return None
    path = expand(folder).absolute()
    existing = next((one for one in (path, *path.parents) if exists(one)), None)
    return None if existing is None else shutil.disk_usage(existing).free
