"""Where a number comes from: hardware, versions, command, commit, date. No result is without them."""

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sparse_llama.distributed.ranks import device
from sparse_llama.training.metrics import git_commit, versions

_SETTINGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")  # of the environment


@dataclass(frozen=True)
class Provenance:
    """What a reader needs to judge a result and to repeat it."""

    date: str
    command: str
    git_commit: str | None
    """``+`` appended where the checkout has changes; None outside one."""
    hardware: str
    versions: dict[str, str]


def provenance(script: str, arguments: list[str]) -> Provenance:
    """Return the provenance of this process, which runs ``python script arguments``."""
    settings = [f"{name}={os.environ[name]}" for name in _SETTINGS if name in os.environ]
    found = versions()
    with suppress(PackageNotFoundError):  # not everyone has it, and a CPU needs none
        found["triton"] = version("triton")
    return Provenance(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=" ".join([*settings, shlex.join(["python", script, *arguments])]),
        git_commit=git_commit(),
        hardware=_hardware(),
        versions=found,
    )


def clock_mhz() -> int | None:
    """Return the GPU's clock as it runs now; None without a GPU or its tool."""
    if device().type == "cpu":
        return None
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    uuid = str(torch.cuda.get_device_properties(device()).uuid)
    try:
        done = subprocess.run(
            [*command, f"--id=GPU-{uuid}"], capture_output=True, text=True, check=True, timeout=10
        )
        return int(done.stdout.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _hardware() -> str:
    if device().type == "cuda":
        found = torch.cuda.get_device_properties(device())
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {instructions}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def _processor() -> str:
    """Return the processor's name, or its architecture where Linux does not tell."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
