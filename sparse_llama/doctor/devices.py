"""What a run would compute on."""

import os
import platform
from pathlib import Path

import torch

from sparse_llama.distributed.ranks import device
from sparse_llama.doctor.findings import Finding
from sparse_llama.reporting.tables import format_bytes

_NEEDED_FOR_BF16 = (8, 0)  # compute capability: Ampere
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def check_devices() -> list[Finding]:
    """Return what a run computes on, each GPU, the CPU and its threads."""
    found = [_used(), *(_gpu(index) for index in range(torch.cuda.device_count()))]
    return [*found, _cpu(), _threads()]


def _used() -> Finding:
    where = device()
    if where.type == "cuda":
        return Finding("a run uses", "ok", f"GPU {where.index}, {torch.cuda.get_device_name(where)}")
    if torch.cuda.is_available():
        told = f"the CPU, though there is a GPU: DS_ACCELERATOR is {os.environ.get('DS_ACCELERATOR')}"
        return Finding("a run uses", "warn", told, "unset DS_ACCELERATOR to use the GPU")
    return Finding("a run uses", "ok", "the CPU; there is no GPU that torch can use")


def _gpu(index: int) -> Finding:
    one = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    has_bf16 = (one.major, one.minor) >= _NEEDED_FOR_BF16
    told = (
        f"{one.name}, compute capability {one.major}.{one.minor}, {format_bytes(total)}, "
        f"{format_bytes(free)} free, {'bf16' if has_bf16 else 'no bf16'}"
    )
    name = f"GPU {index}"
    if not has_bf16:
        return Finding(name, "warn", told, 'use "fp16": {"enabled": true} in place of "bf16"', varies=True)
    if free < 0.9 * total:
        advice = "another process uses it: nvidia-smi shows which; a run would have the rest only"
        return Finding(name, "warn", told, advice, varies=True)
    return Finding(name, "ok", told, varies=True)


def _cpu() -> Finding:
    kinds = torch.backends.cpu.get_cpu_capability()
    return Finding("CPU", "ok", f"{_model()}, {kinds}")


def _threads() -> Finding:
    usable, every = len(os.sched_getaffinity(0)), os.cpu_count()
    threads, quota = torch.get_num_threads(), cpu_quota()
    told = f"{usable} of {every} cores usable, torch uses {threads} thread{'s' if threads != 1 else ''}"
    told += " (OMP_NUM_THREADS)" if "OMP_NUM_THREADS" in os.environ else ""
    told += f", this container may use {quota:g} cores' time" if quota is not None else ""
    most = min(usable, usable if quota is None else max(1, round(quota)))
    if threads > most:
        advice = f"export OMP_NUM_THREADS={most}: more threads than cores wait for each other"
        return Finding("cores", "warn", told, advice)
    return Finding("cores", "ok", told)


def cpu_quota(file: Path = _CPU_QUOTA) -> float | None:
    """Return the cores' time that a container's control group (version 2) leaves it; None is no limit."""
    try:
        quota, period = file.read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or the limit is the word "max"
        return None


def _model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
