"""Peaks of real steps on the CPU, by the events of PyTorch's own allocator; nothing of ``planning`` is used.

    python profiled_steps.py cells.json

For every cell, ``{"config": a LlamaConfig's, "document": a configuration's, "lengths": of documents}``,
prints a line of JSON: the running maximum of what was allocated from before the model was made until after
its second optimizer step, and (but for ``"resident": false``) how much the process' resident memory grew at
most in the same without the profiler.
"""

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from allocator_events import running_maximum
from rank_processes import ROOT, process_environment
from torch.profiler import ProfilerActivity, profile

from sparse_llama.config.run import Overrides, Run, load_run
from sparse_llama.data.batches import Batch
from sparse_llama.distributed import ranks
from sparse_llama.training.engine import optimizer_step
from sparse_llama.training.session import start_model


def take_steps(run: Run, lengths: list[int], num_steps: int) -> None:
    assembled, _, engine = start_model(run, None)
    engine.train()
    rows = run.micro_batch_size
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1).contiguous()
    for _ in range(num_steps):
        batches: list[Batch] = []
        for _ in range(run.gradient_accumulation_steps):
            ids = torch.randint(assembled.model.config.vocab_size, positions.shape)
            batches.append(Batch(ids, positions.clone(), ids.clone()))
        optimizer_step(engine, batches)
    engine.destroy()


def status_bytes(name: str) -> int:
    """Return ``VmRSS``, what is resident now, or ``VmHWM``, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (found,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(found.split()[1]) * 1024


def run_of(cell: dict[str, Any], folder: Path) -> Run:
    """Return the run of a cell's document, on a base of its configuration."""
    (folder / "config.json").write_text(json.dumps(cell["config"]))
    cell["document"]["sparse_llama"]["model"] = {"path": str(folder), "random_weights": True}
    (folder / "run.json").write_text(json.dumps(cell["document"]))
    return load_run(folder / "run.json", Overrides(), 1)


def measure(cell: dict[str, Any], folder: Path) -> dict[str, int]:
    run = run_of(cell, folder)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        take_steps(run, cell["lengths"], num_steps=2)
    allocated = running_maximum(profiled)
    del profiled
    if not cell.get("resident", True):
        return {"allocated": allocated, "resident": 0}
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_bytes("VmRSS")
    take_steps(run, cell["lengths"], num_steps=2)
    return {"allocated": allocated, "resident": status_bytes("VmHWM") - before}


def print_cells(look: Callable[[dict[str, Any], Path], dict[str, int]]) -> None:
    """Print what ``look`` finds of every cell in the file on the command line, given a folder to use."""
    cells = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    ranks.initialize()
    with tempfile.TemporaryDirectory() as name:
        for cell in cells:
            print(json.dumps(look(cell, Path(name))), flush=True)
    ranks.finalize()


def look_at_cells(script: str, cells: list[dict[str, Any]], folder: Path, *, key: str) -> list[Any]:
    """Return what a ``script`` that ends in ``print_cells`` prints of each cell: objects that begin with
    ``key``."""
    (folder / "cells.json").write_text(json.dumps(cells))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / script), "cells.json"],
        env=process_environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(f'{{"{key}"')]


if __name__ == "__main__":
    print_cells(measure)
