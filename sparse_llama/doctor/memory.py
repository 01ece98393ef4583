"""What is free: host memory, pinned and shared memory, and the folders that a run writes to."""

import os
import resource
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from sparse_llama.config.settings import DataSettings
from sparse_llama.data.cache import open_cache
from sparse_llama.distributed.build_locks import builds_folder
from sparse_llama.distributed.ranks import device
from sparse_llama.doctor.findings import Finding, Status
from sparse_llama.planning.hardware import GIB, this_machine
from sparse_llama.reporting.tables import format_bytes

_MIB = 2**20
_PINNED_BYTES = 256 * _MIB
_SHARED_BYTES = 66 * _MIB  # of /dev/shm, a rank on CPUs: csrc/cpu/comm/shm.cpp
_DEMO_BYTES, _COMFORTABLE_BYTES = 2 * GIB, 8 * GIB


@dataclass(frozen=True)
class Folder:
    """A folder that runs write to, and what they need of it."""

    name: str
    path: Path
    needed_bytes: int
    what: str
    """That is written there."""
    if_closed: Status
    """What it means that nothing can be written there."""
    elsewhere: str
    """How to name another one."""


def check_memory() -> list[Finding]:
    """Return what is free of memory and on drives."""
    found = [_host(this_machine().host_bytes), *_pinned(), *_shared()]
    return [*found, *(check_folder(folder) for folder in folders())]


def folders() -> list[Folder]:
    """Return the folders that a run writes to, as this process would."""
    from huggingface_hub.constants import HF_HUB_CACHE

    rows = open_cache(DataSettings(), Console(quiet=True))
    assert rows is not None, "on by default"
    return [
        Folder("runs/", Path("runs"), GIB, "results and checkpoints", "fail", "--output_dir DIR"),
        Folder("temporary", Path(tempfile.gettempdir()), GIB, "compilers' files", "fail", "TMPDIR=DIR"),
        Folder("row cache", rows.folder, GIB, "tokenised data", "warn", "SPARSE_LLAMA_CACHE=DIR"),
        Folder("model cache", Path(HF_HUB_CACHE), 15 * GIB, "models of the hub", "warn", "HF_HOME=DIR"),
        Folder("op builds", builds_folder(), GIB, "DeepSpeed's ops", "warn", "TORCH_EXTENSIONS_DIR=DIR"),
    ]


def check_folder(folder: Folder) -> Finding:
    """Return whether there is room in a folder, or where it would be made, and whether a file can be."""
    path = folder.path.expanduser().absolute()
    existing = next(one for one in (path, *path.parents) if one.exists())
    told = f"{path}, for {folder.what}"
    elsewhere = f"name another folder with {folder.elsewhere}"
    try:
        free = shutil.disk_usage(existing).free
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"doctor")
            file.flush()
    except OSError as error:
        return Finding(folder.name, folder.if_closed, f"{told}: {error.strerror}", elsewhere)
    told += f": {format_bytes(free)} free"
    if free < folder.needed_bytes:
        advice = f"keep {format_bytes(folder.needed_bytes)} free, or {elsewhere}"
        return Finding(folder.name, "warn", told, advice, varies=True)
    return Finding(folder.name, "ok", told, varies=True)


def _host(available: int) -> Finding:
    told = f"{format_bytes(available)} available to this process"
    if available < _DEMO_BYTES:
        return Finding("host memory", "fail", told, "the smallest run needs 2 GiB: free some", varies=True)
    if available < _COMFORTABLE_BYTES:
        advice = "enough for small models; offload to the host and a 7B base need more"
        return Finding("host memory", "warn", told, advice, varies=True)
    return Finding("host memory", "ok", told, varies=True)


def _pinned() -> list[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "no limit" if soft == resource.RLIM_INFINITY else format_bytes(soft)
    told = f"ulimit -l: {limit}"
    if device().type == "cpu":
        return [Finding("pinned memory", "none", f"{told}; only GPUs need it")]
    try:
        torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        told += f"; {format_bytes(_PINNED_BYTES)} cannot be pinned ({str(error).splitlines()[0]})"
        return [
            Finding("pinned memory", "fail", told, "raise it: ulimit -l unlimited, or --ulimit memlock=-1")
        ]
    return [Finding("pinned memory", "ok", f"{format_bytes(_PINNED_BYTES)} can be pinned; {told}")]


def _shared() -> list[Finding]:
    """Return whether several ranks on CPUs, or NCCL's, can share memory."""
    if sys.platform != "linux":
        return []
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return [Finding("/dev/shm", "warn", f"cannot be looked at ({error.strerror})", "mount it")]
    told = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} free"
    ranks = max(2, int(os.environ.get("LOCAL_SIZE", "1")), torch.cuda.device_count())
    if usage.free < ranks * _SHARED_BYTES:
        advice = f"{ranks} ranks need {format_bytes(ranks * _SHARED_BYTES)}: docker run --shm-size=1g"
        return [Finding("/dev/shm", "warn", told, advice, varies=True)]
    return [Finding("/dev/shm", "ok", told, varies=True)]
