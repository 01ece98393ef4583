"""Planned against measured: the peak of real steps under DeepSpeed, in a process of its own, by the running
maximum of the allocator's events, which shares no code with the planner."""

from pathlib import Path
from typing import Any

import pytest
from planned_runs import FIXED, document, llama, run_of
from profiled_steps import look_at_cells

from sparse_llama.planning.estimate import estimate

SHAPE: dict[str, Any] = {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
TILES = {"norm_tile": 256, "mlp_tile": 256, "loss_tile": 256}
HOST = {"cpu_checkpointing": True}
V2: dict[str, Any] = {"version": "v2", "checkpointing": {}, "memory": TILES}
CASES: dict[str, dict[str, Any]] = {
    "v1, nothing": {},
    "v2 bf16 sparse": {**V2, "precision": "bf16", "sparse_attention": FIXED},
    "v2, head groups on the host": V2 | {"checkpointing": HOST, "memory": TILES | {"head_groups": 2}},
    "v1 bf16, checkpoints and tiles": {"precision": "bf16", "checkpointing": {}, "memory": TILES},
    "v1, checkpoints": {"checkpointing": {}},
    "v2, nothing": {"version": "v2"},
    "v2, tiled loss": {"version": "v2", "memory": {"loss_tile": 256}},
    "v2, tiles without checkpoints": {"version": "v2", "memory": TILES},
    "v2, checkpoints and tiles": V2,
    "v2, every second input on the host": V2 | {"checkpointing": HOST | {"number_checkpoints": 3}},
    "v1, inputs on the drive": {"checkpointing": HOST, "memory": TILES | {"checkpoint_nvme_path": "."}},
    "v2 sparse, nothing": {"version": "v2", "sparse_attention": FIXED},
    "v2, two micro-steps": V2 | {"gradient_accumulation_steps": 2},
    "v2, two rows": V2 | {"rows": 2},
    "v2 top layers": V2 | {"adapter": {"top_layers": 3}},
    "v2 bf16, stage 1": V2 | {"precision": "bf16", "zero_optimization": {"stage": 1}},
    "v2, stage 2": V2 | {"zero_optimization": {"stage": 2}},
    "v2, stage 3": {"version": "v2", "zero_optimization": {"stage": 3}},
    "v1 bf16, stage 3": {"checkpointing": {}, "precision": "bf16", "zero_optimization": {"stage": 3}},
}
BY_DEFAULT = list(CASES)[:3]


def cell(case: str, num_tokens: int, lengths: list[int] | None = None) -> dict[str, Any]:
    settings: Any = {"precision": "fp32"} | CASES[case]
    made = document(num_tokens, **settings)
    config = SHAPE | {"model_type": "llama", "max_position_embeddings": 2 * num_tokens}
    return {"config": config, "document": made, "lengths": lengths or [num_tokens]}


def compare(cells: dict[str, dict[str, Any]], tmp_path: Path) -> dict[str, float]:
    """Return planned over measured for every cell, and print both."""
    found = look_at_cells("profiled_steps.py", list(cells.values()), tmp_path, key="allocated")
    ratios: dict[str, float] = {}
    for (name, one), measured in zip(cells.items(), found, strict=True):
        planned = estimate(
            run_of(tmp_path, one["document"]),
            llama(SHAPE),
            device="cpu",
            document_lengths=one["lengths"],
        )
        num_bytes = planned.run_bytes["host"]
        ratios[name] = num_bytes / measured["allocated"]
        shown = (num_bytes, measured["allocated"], measured["resident"])
        print(f"{name}: planned, allocated, resident MiB", *(f"{size / 2**20:.1f}" for size in shown))
    return ratios


def test_a_few_combinations(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # the other process' own
    cells = {case: cell(case, 512) | {"resident": False} for case in BY_DEFAULT}
    ratios = compare(cells, tmp_path)
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1024, 2048])
def test_every_combination_within_five_percent(num_tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    cells = {case: cell(case, num_tokens) for case in CASES}
    packed = [num_tokens // 8, num_tokens // 2, num_tokens - num_tokens // 8 - num_tokens // 2]
    cells["v2 bf16 sparse, packed"] = cell("v2 bf16 sparse", num_tokens, packed)
    ratios = compare(cells, tmp_path)
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.05)
