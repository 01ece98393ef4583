"""Whole runs whose layers attend differently."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_runs import losses
from training.conftest import REMOVED
from transformers import LlamaConfig

from sparse_llama.adapters.weights import read_adapter_folder
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.model.assemble import plan_of_adapter

Train = Callable[..., Path]
SHORT: dict[str, Any] = {"training": {"steps": 3}}
NO_BSLONGFORMER = {"num_sliding_window_blocks": REMOVED, "global_block_indices": REMOVED}
FIXED = {"mode": "fixed", "block": 16, "num_local_blocks": 2, "attention": "unidirectional"}


def test_gpt_neoxs_block_trains_as_the_same_layouts_written_our_way(train: Train):
    neox = {
        "mode": REMOVED,
        "block": REMOVED,
        "sparsity_config": {"block": 16, "num_local_blocks": 2},
        "attention_config": [[["global", "sparse_fixed"], 2]],
    }
    curve = losses(train("neox", sparse_llama=SHORT, sparse_attention=NO_BSLONGFORMER | neox))
    ours = SHORT | {"attention": {"dense_layers": "::2"}}
    same = losses(train("ours", sparse_llama=ours, sparse_attention=NO_BSLONGFORMER | FIXED))
    everywhere = losses(train("everywhere", sparse_llama=SHORT, sparse_attention=NO_BSLONGFORMER | FIXED))
    assert curve == same
    assert curve != everywhere


def test_an_adapter_keeps_the_layout_of_every_layer(train: Train):
    window = {"mode": "local_sliding_window", "block": 32, "num_sliding_window_blocks": 3}
    attention = {"dense_layers": [-1], "layouts": [{"layers": [1, 3], "sparse_attention": window}]}
    folder = train("run", sparse_llama=SHORT | {"attention": attention})
    file, _ = read_adapter_folder(folder / "adapter")
    modes = [None if one is None else one.mode for one in file.layouts.resolve(4)]
    assert modes == ["bslongformer", "local_sliding_window", "bslongformer", None]
    assert file.layouts.resolve(4)[1] == parse_sparsity(window)


def test_an_adapter_trained_with_a_mask_keeps_the_mask(train: Train, tmp_path: Path):
    mask = np.tri(20, dtype=bool) & (np.random.default_rng(0).random((4, 20, 20)) < 0.3)
    mask |= np.eye(20, dtype=bool)
    file = tmp_path / "mask.npy"
    np.save(file, mask)
    block = {"mode": "mask", "block": 16, "path": str(file)}
    folder = train("run", sparse_llama=SHORT, sparse_attention=NO_BSLONGFORMER | block)
    file.unlink()
    adapter, _ = read_adapter_folder(folder / "adapter")
    plan = plan_of_adapter(adapter, LlamaConfig(num_hidden_layers=4, num_attention_heads=4))
    for layer in range(4):
        layout = plan.layout(layer, 320)
        assert layout is not None
        assert torch.equal(layout.dense(), torch.from_numpy(mask))
