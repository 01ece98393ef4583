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
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from allocator_events import running_maximum
from torch.profiler import ProfilerActivity, profile

from sparse_llama.config.run import Overrides, Run, load_run
from sparse_llama.data.batches import Batch
from sparse_llama.distributed import ranks
from sparse_llama.model.assemble import assemble
from sparse_llama.model.objective import TokenLoss
from sparse_llama.training.engine import optimizer_step, start_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def take_steps(run: Run, lengths: list[int], num_steps: int) -> None:
    settings = run.settings
    assembled = assemble(
        settings,
        run.layouts,
        dtype=DTYPES[run.precision],
        checkpointing=run.checkpointing,
        zero3_config=run.deepspeed if run.zero_stage == 3 else None,
    )
    objective = TokenLoss(assembled.model, loss_tile=settings.memory.loss_tile)
    engine = start_engine(run, objective, assembled.model, None)
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


def measure(cell: dict[str, Any], folder: Path) -> dict[str, int]:
    (folder / "config.json").write_text(json.dumps(cell["config"]))
    (folder / "run.json").write_text(json.dumps(cell["document"]))
    run = load_run(folder / "run.json", Overrides(), 1)
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


def main() -> None:
    cells = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    ranks.initialize()
    with tempfile.TemporaryDirectory() as name:
        for cell in cells:
            cell["document"]["sparse_llama"]["model"] = {"path": name, "random_weights": True}
            print(json.dumps(measure(cell, Path(name))), flush=True)
    ranks.finalize()


if __name__ == "__main__":
    main()
