"""Runs that train on from an adapter: its tensors, its variant, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import losses
from training.conftest import REMOVED, write_configuration

from sparse_llama.adapters.weights import read_adapter_folder, write_adapter_folder
from sparse_llama.config.run import Overrides, load_run
from sparse_llama.errors import CheckpointError, ConfigError

Train = Callable[..., Path]
STEPS = {"training": {"steps": 3}}
VARIANT = {"version": "v1", "gate": "scalar", "gate_activation": "tanh", "top_layers": 2, "prompt_length": 3}


def before(folder: Path) -> float:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))["validation_loss_before"]


def after(folder: Path) -> float:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))["validation_loss"]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_begins_where_the_adapter_ended_and_keeps_its_variant(train: Train, stage):
    """The gates' start is 0, where a base's loss would show; the learning rate moves them in 3 steps."""
    first = train("first", sparse_llama=STEPS | {"adapter": {"start_layer": REMOVED} | VARIANT})
    start = {"training": {"steps": 3, "init_adapter": str(first)}, "adapter": REMOVED}
    second = train("second", sparse_llama=start, zero_optimization={"stage": stage})
    assert before(second) == pytest.approx(after(first), rel=1e-6)
    assert abs(before(first) - after(first)) > 5e-4  # what the comparison above allows is 6e-6
    file, tensors = read_adapter_folder(second / "adapter")
    assert file.adapter.model_dump(exclude_defaults=True) == VARIANT
    _, old = read_adapter_folder(first / "adapter")
    assert tensors.keys() == old.keys()
    assert all(not torch.equal(tensors[name], old[name]) for name in old)
    assert losses(second)[0] != losses(first)[0]


def test_the_flag_takes_the_place_of_the_block(workplace: Path, tmp_path: Path):
    (tmp_path / "old").mkdir()
    file = write_configuration(workplace, tmp_path, {})
    run = load_run(file, Overrides(adapter=str(tmp_path / "old")), world_size=1)
    assert run.settings.training.init_adapter == str(tmp_path / "old")
    assert run.settings.adapter.model_dump(exclude_defaults=True) == {}
    with pytest.raises(ConfigError, match=r"--adapter: must be v1, v2 or the path of an adapter .*, got v3"):
        load_run(file, Overrides(adapter="v3"), world_size=1)


def test_a_variant_beside_the_adapter_is_refused(workplace: Path, tmp_path: Path):
    start = {"sparse_llama": {"training": {"init_adapter": "somewhere"}}}
    file = write_configuration(workplace, tmp_path, start)
    with pytest.raises(ConfigError, match=r"sparse_llama\.adapter: .*the run trains on from .*init_adapter"):
        load_run(file, Overrides(), world_size=1)


def test_an_adapter_that_is_missing_or_of_another_base_is_refused(train: Train, tmp_path: Path):
    def start(path: Path) -> dict[str, Any]:
        return {"training": {"steps": 3, "init_adapter": str(path)}, "adapter": REMOVED}

    with pytest.raises(CheckpointError, match=r"init_adapter: .*nowhere: no such file or folder"):
        train("run", sparse_llama=start(tmp_path / "nowhere"))
    first = train("first", sparse_llama=STEPS)
    file, tensors = read_adapter_folder(first / "adapter")
    tensors["model.norm.weight"] = torch.ones(64)
    write_adapter_folder(tmp_path / "wide", tensors, file)
    with pytest.raises(
        CheckpointError, match=r"wide: model.norm.weight has shape \[64\], this base needs \[32\]"
    ):
        train("run", sparse_llama=start(tmp_path / "wide"))
