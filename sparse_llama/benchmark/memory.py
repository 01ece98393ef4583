"""The memory of a training step over the length of its row: this project's levers one after the other, beside
plain transformers and PEFT.

Every measurement is a process of its own under one budget (``planning.probe``); memory that runs out is a
result. The base is small and its vocabulary is not, so that logits weigh as they do in a large model.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from sparse_llama.benchmark.shapes import Shape
from sparse_llama.config.flags import Overrides
from sparse_llama.planning.levers import TILE
from sparse_llama.planning.probe import (
    CRASHED,
    OUT_OF_MEMORY,
    Outcome,
    Probe,
    measure,
    read_saved,
    run_module,
)
from sparse_llama.planning.probe import Cell as ProbeCell
from sparse_llama.training.metrics import write_json

OTHERS = {
    "transformers": "transformers",
    "transformers_checkpointed": "transformers, checkpointing",
    "transformers_offloaded": "transformers, checkpointing, DeepSpeed's offload",
    "peft_checkpointed": "PEFT adaption prompt, checkpointing",
}
"""What others have, by the word of a flag."""
ONLY_ON_GPU = ("transformers_offloaded",)
ADAPTERS = ("v1", "v2")
LONG = 32768
"""Tokens from which the first step is timed, as what it does once is nothing beside it; and from which
tensors are not counted, as the record of a step would not fit."""
BLOCK = 64
_WINDOW_BLOCKS = 15
_MOST_POSITIONS = 2**24
_CELL = "sparse_llama.benchmark.memory_cell"


@dataclass(frozen=True)
class Rung:
    """One more lever, on top of those before it."""

    key: str
    name: str
    flags: dict[str, Any]
    """Of ``Overrides``; its own."""


def rungs(device: str, num_layers: int, drive: Path) -> tuple[Rung, ...]:
    """Return the ladder. On a GPU layers' inputs wait in host memory; on a CPU they are there: on a drive."""
    where, place = ("cpu", "host memory") if device == "cuda" else ("nvme", "the drive")
    offload: dict[str, Any] = {"checkpointing": where}
    if where == "nvme":
        offload["nvme_path"] = drive
    return (
        Rung("none", "no lever", {}),
        Rung("checkpointing", "checkpointing", {"checkpointing": "gpu"}),
        Rung("loss_tile", "+ loss tile", {"loss_tile": TILE}),
        Rung("mlp_tile", "+ MLP tile", {"mlp_tile": TILE}),
        Rung("norm_tile", "+ norm tile", {"norm_tile": TILE}),
        Rung("offload", f"+ inputs in {place}" if device == "cuda" else f"+ inputs on {place}", offload),
        Rung("head_groups", "+ head groups", {"head_groups": 4}),
        Rung("number_checkpoints", "+ every 2nd input", {"number_checkpoints": -(-num_layers // 2)}),
    )


RUNG_KEYS = tuple(rung.key for rung in rungs("cpu", 2, Path()))


@dataclass(frozen=True)
class Contender:
    """What trains: one of ``OTHERS``, or an adapter of ours with the levers up to a rung."""

    kind: str
    """A key of ``OTHERS``, or a version of the adapter."""
    rung: str = ""
    """Its key; empty of others."""

    @property
    def is_ours(self) -> bool:
        return self.kind in ADAPTERS


@dataclass(frozen=True)
class MemoryCell:
    """One measurement."""

    contender: Contender
    num_tokens: int


@dataclass(frozen=True)
class MeasuredCell:
    """What came of it."""

    outcome: Outcome
    elapsed_s: float
    """Of the whole process, start to end."""


@dataclass
class MemoryBook:
    """The measurements of one base and budget, kept in ``file`` as they come.

    Args:
        folder: for the base's configuration, each process' order and log, and what goes to a drive.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``bfloat16``.
    """

    file: Path
    folder: Path
    shape: Shape
    device: str
    dtype: str
    budget_bytes: int
    cells: dict[MemoryCell, MeasuredCell] = field(default_factory=dict)
    longest: dict[Contender, int] = field(default_factory=dict)
    """Longest row by the plan."""

    @property
    def rungs(self) -> tuple[Rung, ...]:
        return rungs(self.device, self.shape.num_layers, self.folder / "drive")

    def name_of(self, contender: Contender) -> str:
        """Return what readers see."""
        if not contender.is_ours:
            return OTHERS[contender.kind]
        rung = next(one for one in self.rungs if one.key == contender.rung)
        return f"{contender.kind}, {rung.name}"

    def probe_of(self, contender: Contender, num_tokens: int) -> Probe:
        """Return the probe that measures one of ours, with its levers as flags."""
        flags: dict[str, Any] = {}
        for rung in self.rungs:
            flags |= rung.flags
            if rung.key == contender.rung:
                break
        return Probe(
            config_path=self.folder / "run.json",
            overrides=Overrides(adapter=contender.kind, output_dir=self.folder / "none", **flags),
            output_dir=self.folder / f"{contender.kind}_{contender.rung}",
            budget_bytes=self.budget_bytes,
            num_steps=num_steps(num_tokens),
            counts_tensors=num_tokens < LONG,
        )

    def prepare(self) -> None:
        """Write what the processes read: the base's configuration, and the run's document."""
        for name in ("drive", "base"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "base" / "config.json", base_config(self.shape))
        write_json(self.folder / "run.json", document(self.folder / "base", self.dtype))

    def resume(self, identity: dict[str, Any]) -> int:
        """Take over what an earlier call has measured; return how many cells that is. What crashed is no
        measurement, and is tried again.

        Raises:
            ConfigError: the file holds other measurements.
        """
        self._identity = identity
        saved = read_saved(self.file, identity)
        for entry in saved["cells"]:
            outcome = Outcome.of_json(entry)
            cell = MemoryCell(Contender(entry["contender"], entry["rung"]), entry["num_tokens"])
            if outcome.status != CRASHED:
                self.cells[cell] = MeasuredCell(outcome, entry["elapsed_s"])
        self.longest = {
            Contender(one["contender"], one["rung"]): one["num_tokens"] for one in saved["longest"]
        }
        return len(self.cells)

    def save(self, provenance: dict[str, Any]) -> None:
        """Write the file."""
        content = {
            "provenance": provenance,
            "identity": self._identity,
            "cells": [
                {"contender": cell.contender.kind, "rung": cell.contender.rung, "num_tokens": cell.num_tokens}
                | {"elapsed_s": one.elapsed_s}
                | asdict(one.outcome)
                for cell, one in self.cells.items()
            ],
            "longest": [
                {"contender": one.kind, "rung": one.rung, "num_tokens": length}
                for one, length in self.longest.items()
            ],
        }
        write_json(self.file, content)


def num_steps(num_tokens: int) -> int:
    """Return the steps of a measurement; with two, the first is not timed."""
    return 1 if num_tokens >= LONG else 2


def base_config(shape: Shape) -> dict[str, Any]:
    """Return ``config.json`` of the base, whose positions are not what ends a row."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": _MOST_POSITIONS,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def document(base: Path, dtype: str) -> dict[str, Any]:
    """Return the run that is ours: one row a step, every weight of the base drawn."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 0},
        **({"bf16": {"enabled": True}} if dtype == "bfloat16" else {}),
        "sparse_attention": {
            "mode": "bslongformer",
            "block": BLOCK,
            "num_sliding_window_blocks": _WINDOW_BLOCKS,
            "global_block_indices": [0],
            "attention": "unidirectional",
        },
        "sparse_llama": {
            "seq_length": 1024,  # longer rows' layouts are their own
            "model": {"path": str(base.absolute()), "random_weights": True},
            "training": {"steps": 2},
        },
    }


def measure_cell(book: MemoryBook, cell: MemoryCell) -> MeasuredCell:
    """Return what steps of ``cell`` take, and what they were planned to take where that is ours."""
    started_s = perf_counter()
    if cell.contender.is_ours:
        probe = book.probe_of(cell.contender, cell.num_tokens)
        outcome = measure(probe, ProbeCell(0, "none", cell.num_tokens))
    else:
        order = {
            "kind": cell.contender.kind,
            "shape": asdict(book.shape),
            "num_tokens": cell.num_tokens,
            "dtype": book.dtype,
            "budget_bytes": book.budget_bytes,
            "num_steps": num_steps(cell.num_tokens),
            "counts_tensors": cell.num_tokens < LONG,
        }
        name = f"{cell.contender.kind}_{cell.num_tokens}"
        outcome = run_module(_CELL, name, book.folder / "others", order, num_ranks=1)
    elapsed_s = perf_counter() - started_s
    if cell.contender.is_ours:
        outcome = replace(outcome, planned_bytes=planned_bytes(book, cell))
    return MeasuredCell(outcome, elapsed_s)


def planned_bytes(book: MemoryBook, cell: MemoryCell) -> dict[str, int]:
    """Return the plan's peaks by place, without the libraries."""
    from transformers import LlamaConfig

    from sparse_llama.planning.estimate import estimate

    run = book.probe_of(cell.contender, cell.num_tokens).run_of(ProbeCell(0, "none", cell.num_tokens))
    config = LlamaConfig.from_dict(base_config(book.shape))
    return estimate(run, config, device="cuda" if book.device == "cuda" else "cpu").run_bytes


def plan_longest(book: MemoryBook, contender: Contender) -> int:
    """Return the longest row of one of ours that the plan fits into the budget, within 2%."""
    from transformers import LlamaConfig

    from sparse_llama.planning.estimate import LIBRARY_BYTES
    from sparse_llama.planning.hardware import GPU_RESERVE_BYTES, Hardware, available_host_bytes
    from sparse_llama.planning.search import Planner

    hardware = Hardware(gpu_bytes=None, host_bytes=book.budget_bytes + LIBRARY_BYTES["cpu"])
    if book.device == "cuda":  # the cap is the allocator's, which has no part in the reserve
        hardware = Hardware(book.budget_bytes + GPU_RESERVE_BYTES, available_host_bytes())
    run = book.probe_of(contender, BLOCK).run_of(ProbeCell(0, "none", 16384))
    planner = Planner(LlamaConfig.from_dict(base_config(book.shape)), hardware)
    return planner.longest(run, precision=0.02).num_tokens


def next_cell(
    contenders: Sequence[Contender],
    lengths: Sequence[int],
    outcome_of: Callable[[MemoryCell], Outcome | None],
) -> MemoryCell | None:
    """Return what is to be measured next, or None. Shortest rows first; where one ran out of memory longer
    ones would, too, and of these only the last is measured."""
    last = max(lengths)
    for length in sorted(lengths):
        for contender in contenders:
            cell = MemoryCell(contender, length)
            if outcome_of(cell) is not None:
                continue
            shorter = [outcome_of(MemoryCell(contender, one)) for one in lengths if one < length]
            if length != last and any(one and one.status == OUT_OF_MEMORY for one in shorter):
                continue
            return cell
    return None
