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
from rich.console import Console

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
    lines beyond the step it resumes from, and one that a killed process has left unfinished.

    Where the drive is full, lines wait in memory for room: a curve is no reason to end a run.
    """

    def __init__(self, path: Path, last_step: int, console: Console) -> None:
        self._path, self._console = path, console
        self._waiting: list[str] = []
        kept = [line for line in read_step_lines(path) if line["step"] <= last_step]
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        unfinished.replace(path)

    def append(self, line: dict[str, Any]) -> None:
        """Write one line and flush it, with those that wait."""
        self._waiting.append(f"{json.dumps(line)}\n")
        try:
            with self._path.open("ab") as file:
                end = file.tell()
                try:
                    file.write("".join(self._waiting).encode())
                    file.flush()
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            if len(self._waiting) == 1:
                told = f"{self._path}: cannot be written ({error.strerror}); lines wait until there is room"
                self._console.print(f"note: {told}", style="bold red")
            return
        self._waiting.clear()


def read_step_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file that ``StepLines`` writes; none where there is no file.

    A process that was killed may have left its last line unfinished: it is left out.
    """
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    lines = list[dict[str, Any]]()
    for text in whole.splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


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
