"""What the plan's tests share: runs of shipped documents, and estimates made from a formula."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from sparse_llama.config.run import Overrides, Run, load_run
from sparse_llama.config.settings import ModelSettings
from sparse_llama.planning.estimate import Estimate, Place, Traffic
from sparse_llama.planning.hardware import GIB, Hardware
from sparse_llama.planning.shapes import find_base

ROOT = Path(__file__).parents[1]
SEVEN_B = "openlm-research/open_llama_7b"
A100 = Hardware(gpu_bytes=40 * GIB, host_bytes=96 * GIB)
U = 8192
"""Bytes of a token by 7B's width in bf16."""


def seven_b() -> LlamaConfig:
    return find_base(ModelSettings(path=SEVEN_B)).config


def run_of(name: str = "a100_40g", ranks: int = 1, **flags: Any) -> Run:
    """Return the run of a shipped document."""
    overrides = Overrides(output_dir=Path("nowhere"), **flags)
    path = ROOT / "ds_configs" / f"{name}.json"
    return load_run(path, overrides, ranks, is_main=False, is_here=False)


def estimator(
    formula: Callable[[Run], Mapping[Place, int]], asked: list[int] | None = None
) -> Callable[..., Estimate]:
    """Return a stand-in for ``estimate`` whose peaks are a formula's; ``asked`` collects the lengths."""

    def made(run: Run, config: LlamaConfig, **_: Any) -> Estimate:
        if asked is not None:
            asked.append(run.settings.seq_length)
        peak = dict(formula(run))
        return Estimate(
            peak_bytes=peak,
            components={place: {"activations": count} for place, count in peak.items()},
            alive=(),
            phase="backward of layer 1",
            saved_bytes_per_token_and_layer=0.0,
            traffic_bytes=Traffic(),
            flops=0.0,
        )

    return made


def ladder_of_v1(run: Run) -> dict[Place, int]:
    """Return what v1 at 7B shapes was measured to need with the levers of ``run``: the slopes of the ladder,
    which share nothing with the planner but the shapes. Rungs are cumulative; a tile without a checkpoint
    gives what it gives with one."""
    memory, block = run.settings.memory, run.checkpointing
    tokens = run.micro_batch_size * run.settings.seq_length
    kept, host = 30, 2 * GIB
    if block is not None and block.number_checkpoints is not None:
        kept = min(kept, block.number_checkpoints)
    if memory.head_groups is not None:  # its own checkpoint
        slope = int((4 + 8 / memory.head_groups + 1.4 + kept) * U)
    else:
        slope = 4_369_032 if block is None else 646_684 - (30 - kept) * U
        slope -= int(23.5 * U) if memory.loss_tile is not None else 0
        slope -= int(6.1 * U) if memory.mlp_tile is not None else 0
        slope -= int(6.3 * U) if memory.norm_tile is not None else 0
    if block is not None and block.cpu_checkpointing:
        slope -= kept * U
        host += kept * U * tokens
    weights = 13_476_000_000
    if "offload_param" in run.deepspeed["zero_optimization"]:
        weights, host = 1_440_000_000, host + weights
    return {"gpu": weights + slope * tokens, "host": host, "disk": 0}
