"""Which of DeepSpeed's ops a run loads, by its documentation of ``offload_optimizer`` and ``torch_adam``."""

import json
from pathlib import Path
from typing import Any

import pytest
from shipped_documents import FOLDER, load_shipped

from sparse_llama.training.libraries import ops_of

HOST = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("cpu_demo", []),
        ("a100_40g", []),
        ("a100_40g_512k", ["cpu_adam"]),
        ("nvme", ["cpu_adam", "pin_memory", "async_io"]),
    ],
)
def test_the_shipped_documents_load(name: str, ops: list[str], tmp_path: Path):
    assert ops_of(load_shipped(FOLDER / f"{name}.json", tmp_path)) == ops


@pytest.mark.parametrize(
    ("optimizer", "zero", "ops"),
    [
        ({"type": "AdamW", "params": {"torch_adam": False}}, {"stage": 2}, ["fused_adam"]),
        ({"type": "AdamW", "params": {"torch_adam": True}}, HOST, []),
        ({"type": "Adagrad"}, HOST, ["cpu_adagrad"]),
        ({"type": "Adagrad"}, {"stage": 2}, []),  # torch's own
        ({"type": "Lion"}, HOST, ["cpu_lion"]),
        ({"type": "Lion"}, {"stage": 1}, ["fused_lion"]),
        ({"type": "SGD"}, {"stage": 0}, []),
    ],
)
def test_the_optimizer_decides(
    optimizer: dict[str, Any], zero: dict[str, Any], ops: list[str], tmp_path: Path
):
    document = json.loads((FOLDER / "cpu_demo.json").read_text(encoding="utf-8"))
    document |= {"optimizer": optimizer, "zero_optimization": zero}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    assert ops_of(load_shipped(path, tmp_path)) == ops
