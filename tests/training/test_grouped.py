"""Grouping by length costs fewer tokens and changes no step."""

import json
from pathlib import Path

import pytest
from small_runs import losses

from sparse_llama.config.run import Overrides, load_run
from sparse_llama.training.loop import fit


def test_a_grouped_run_has_the_losses_of_the_ungrouped_one_and_reads_less(tmp_path: Path):
    """Sums are in another order, which fp32 notices from the seventh digit on."""
    tokens = []
    for name, is_grouped in (("drawn", False), ("grouped", True)):
        document = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "sparse_llama": {
                "seq_length": 128,
                "data": {"packing": False, "group_by_length": is_grouped, "max_records": 200},
                "training": {"steps": 4, "samples": 0},
            },
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
        fit(load_run(tmp_path / f"{name}.json", Overrides(output_dir=tmp_path / name), 1))
        tokens.append(json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8"))["tokens"])
    assert losses(tmp_path / "grouped") == pytest.approx(losses(tmp_path / "drawn"), rel=1e-4)
    assert losses(tmp_path / "drawn")[0] > 1.2 * losses(tmp_path / "drawn")[-1], "or no step did anything"
    assert tokens[1] < tokens[0]
