"""What a run measures: one JSON object per step and per validation, a summary at the end, scalars for
DeepSpeed's monitors."""

import json
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sparse_llama import __version__
from sparse_llama.distributed.ranks import device
from sparse_llama.training.host_memory import peak_resident_bytes


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. ``tokens`` counts labelled tokens, ``tokens_per_s`` all tokens that went through
    the model."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    elapsed_s: float
    peak_memory_bytes: int


class StepLines:
    """Appends to a file of one JSON object per line, each with its ``step``; a resumed run first drops the
    lines beyond the step it resumes from."""

    def __init__(self, path: Path, last_step: int) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= last_step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._path = path

    def append(self, line: dict[str, Any]) -> None:
        """Write one line and flush it."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Monitors:
    """DeepSpeed's monitors (TensorBoard, W&B, CSV, Comet), fed per optimizer step.

    The engine's own events count samples and log the scaled loss of one micro-batch, so the monitor blocks
    are kept from the engine and the same classes are driven from here.
    """

    def __init__(self, blocks: dict[str, Any], output_dir: Path) -> None:
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        located = {name: dict(block) for name, block in blocks.items()}
        for name, block in located.items():
            if not block.get("output_path") and name in ("tensorboard", "csv_monitor"):
                block["output_path"] = str(output_dir / name)
        self._master = MonitorMaster(get_monitor_config(located))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Send ``scalars`` of one step to every enabled monitor."""
        if self._master.enabled:
            self._master.write_events([(name, value, step) for name, value in scalars.items()])


class Clock:
    """Seconds of training, without validation; continues from the seconds of earlier sessions of a resumed
    run."""

    def __init__(self, elapsed_s: float = 0.0) -> None:
        self._before_s = elapsed_s
        self._started: float | None = None

    def start(self) -> None:
        """Count from here."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Do not count from here."""
        self._before_s, self._started = self.elapsed_s, None

    @property
    def elapsed_s(self) -> float:
        """Seconds counted so far."""
        running_s = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._before_s + running_s


def peak_memory_bytes() -> dict[str, int]:
    """Return the peak bytes of this process: ``host`` (resident set) and ``gpu`` (allocated; 0 without
    one)."""
    gpu = torch.cuda.max_memory_allocated() if device().type == "cuda" else 0
    return {"gpu": gpu, "host": peak_resident_bytes()}


def device_name() -> str:
    """Return the name of what computes: the GPU's, or the CPU's architecture and thread count."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    packages = ("torch", "deepspeed", "transformers", "datasets", "sentencepiece")
    return {"sparse_llama": __version__, "python": platform.python_version()} | {
        name: version(name) for name in packages
    }


def git_commit() -> str | None:
    """Return the commit of the checkout this package runs from, ``+`` appended when it has changes; None
    outside one."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if changed else commit


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` in one rename, so that a reader never sees half a file."""
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
