"""Two steps of every cell of a list, in turn, by the ranks of one job; started by the launcher.

Every rank writes one JSON line per cell: losses, how far each step's gradients are from the plain run's at
most, and which tensors got none. The second step's micro-batches are the first's in reverse, and nothing has
moved (the learning rate is 1e-30): its gradients are the same unless something of the first is left over.
"""

import functools
import json
import logging
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cpuinfo
import torch
from deepspeed.utils import logger, safe_get_full_grad
from matrix.plain import ADAPTERS, SEED, SEQ_LENGTH, SPARSITIES, documents_by_row
from matrix.settings import Cell, name_of
from torch import nn

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.config.run import Overrides, Run, load_run
from sparse_llama.data.batches import Batch, Shard, collate
from sparse_llama.data.packing import pack
from sparse_llama.distributed import ranks
from sparse_llama.training.engine import optimizer_step
from sparse_llama.training.masters import write_masters
from sparse_llama.training.moment import UPDATE, Moment
from sparse_llama.training.session import start_model

ACCUMULATION = 2
ROW_LENGTHS = (96, 60, 92, 93)
"""Unequal, so that short ones are padded in a batch, and one odd, so that it is where two ranks share it."""
CHECKPOINTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "every": {},
    "nested": {"number_checkpoints": 2},
}
OFFLOADED = {"none": [], "optimizer": ["offload_optimizer"], "weights": ["offload_param"]}
WHOLE_AT_NO_TIME = {f"stage3_{name}": 0 for name in ("param_persistence_threshold", "prefetch_bucket_size")}


def document_of(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return a cell as a user writes it."""
    checkpointing = CHECKPOINTS[cell["checkpoints"]]
    if checkpointing is not None:
        checkpointing = checkpointing | {"cpu_checkpointing": cell["inputs"] != "device"}
    zero: dict[str, Any] = {"stage": cell["stage"]}
    zero |= {name: {"device": "cpu"} for name in OFFLOADED[cell["offload"]]}
    if cell["stage"] == 3:  # or all of a tiny model stays whole
        zero |= WHOLE_AT_NO_TIME
    memory = {name: cell[name] for name in ("loss_tile", "mlp_tile", "norm_tile", "head_groups")}
    if cell["inputs"] == "drive":
        memory["checkpoint_nvme_path"] = str(folder)
    readers = cell["ranks"] // cell["sharing"]
    return {
        "train_micro_batch_size_per_gpu": len(ROW_LENGTHS) // ACCUMULATION // readers,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-30}},
        "zero_optimization": zero,
        **({"sequence_parallel_size": cell["sharing"]} if cell["sharing"] > 1 else {}),
        "activation_checkpointing": checkpointing,
        "sparse_attention": SPARSITIES[cell["attention"]],
        "sparse_llama": {
            "seq_length": SEQ_LENGTH,
            "seed": SEED,
            "model": {"path": str(folder / "base")},
            "adapter": ADAPTERS[cell["adapter"]],
            "memory": memory,
        },
    }


def own_micro_batches(run: Run) -> list[Batch]:
    """Return this rank's part of the step's rows, as a run shares them out."""
    rows = [
        pack(documents, row_length=length, align=run.layouts.align, seed=0)[0]
        for length, documents in zip(ROW_LENGTHS, documents_by_row(), strict=True)
    ]
    sharing, size = run.sequence_parallel_size, run.micro_batch_size
    reader, num_readers = ranks.rank() // sharing, ranks.world_size() // sharing
    shard = Shard(ranks.rank() % sharing, sharing)
    starts = [(micro_step * num_readers + reader) * size for micro_step in range(ACCUMULATION)]
    return [collate(rows[start : start + size], shard) for start in starts]


@dataclass
class GradientReader(Moment):
    """Reads every parameter's gradient, as DeepSpeed has summed it, when a step is about to be applied."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    num_backwards: int = 0

    def enter(self, phase: str, batch: Batch | None = None) -> None:
        super().enter(phase, batch)
        if phase == UPDATE:
            self.num_backwards += 1
            if self.num_backwards == ACCUMULATION:
                for name, parameter in self.parameters.items():  # every rank in the same order: it sums
                    found = safe_get_full_grad(parameter)
                    self.gradients[name] = None if found is None else found.detach().clone()


def compare(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the largest relative error of a tensor's gradient, whose it is, and who has none."""
    assert found.keys() == expected.keys()
    errors = {
        name: float((gradient.double() - expected[name]).norm() / expected[name].norm())
        for name, gradient in found.items()
        if gradient is not None
    }
    worst = max(errors, key=errors.__getitem__)
    missing = [name for name in found if name not in errors]
    return {"worst": worst, "error": errors[worst], "missing": missing}


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    start_s = time.perf_counter()
    path = folder / f"cell_{ranks.rank()}.json"
    path.write_text(json.dumps(document_of(cell, folder)), encoding="utf-8")
    run = load_run(path, Overrides(output_dir=folder / "unused"), world_size=ranks.world_size())
    assembled, _, engine = start_model(run, None)
    parameters = dict(trainable_parameters(assembled.model))
    plain = torch.load(folder / f"{cell['adapter']} {cell['attention']}.pt")
    write_masters(engine, parameters, plain["state"])
    micro_batches = own_micro_batches(run)
    steps = []
    for batches in (micro_batches, micro_batches[::-1]):
        reader = GradientReader(parameters=parameters)
        loss_sum, num_labelled = optimizer_step(engine, batches, reader)
        steps.append(
            {
                "loss_error": abs(loss_sum / plain["loss_sum"] - 1),
                "is_complete": num_labelled == plain["num_labelled"],
                **compare(reader.gradients, plain["gradients"]),
            }
        )
    engine.destroy()
    notices = [*run.notices, *assembled.notices]
    return {"cell": cell, "steps": steps, "notices": notices, "elapsed_s": time.perf_counter() - start_s}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    # 1 s in a process of its own, which DeepSpeed takes for every optimizer on the host
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    ranks.initialize()
    folder, job = Path(sys.argv[-2]), sys.argv[-1]
    with (folder / f"{job}_{ranks.rank()}.jsonl").open("w", encoding="utf-8") as lines:
        for cell in json.loads((folder / f"{job}.json").read_text(encoding="utf-8")):
            try:
                print(json.dumps(run_cell(cell, folder)), file=lines, flush=True)
            except Exception as error:
                error.add_note(f"cell: {name_of(cell)}")
                raise
    ranks.finalize()
