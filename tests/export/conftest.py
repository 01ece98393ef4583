"""What the tests of exporting share: a run on disk, and a place for the code that transformers copies."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import adapt
from exported_runs import BUNDLED, MASTER_LENGTH, VOCAB_SIZE, TrainedRun
from transformers import LlamaForCausalLM

from sparse_llama.adapters.attach import trainable_state
from sparse_llama.adapters.weights import AdapterFile, BaseModelReference, save_adapter
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.config.sparsity import parse_sparsity


@pytest.fixture
def trained_run(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Callable[..., TrainedRun]:
    """Return a function that writes a base and a run on it, and returns both with the adapted model."""

    def make(
        version: str = "v2",
        *,
        layout: dict[str, Any] | None = None,
        dense_layers: tuple[int, ...] | None = None,
        dtype: str = "float32",
        change: Callable[[LlamaForCausalLM], object] = lambda model: None,
        max_shard_size: str = "1GB",
        **overrides: Any,
    ) -> TrainedRun:
        base, folder = tmp_path / "base", tmp_path / "run"
        model = tiny_llama(vocab_size=VOCAB_SIZE, **overrides)
        model.save_pretrained(base, max_shard_size=max_shard_size)
        shutil.copyfile(BUNDLED / "tokenizer.model", base / "tokenizer.model")
        sparsity = None if layout is None else parse_sparsity(layout)
        adapt(model, version, sparsity=sparsity, dense_layers=dense_layers)
        with torch.no_grad():
            change(model)
        file = AdapterFile(
            base_model=BaseModelReference(path=str(base)),
            adapter=AdapterSettings(version=version, prompt_length=3),  # type: ignore[arg-type]
            sparse_attention=layout,
            dense_layers=dense_layers,
            master_length=MASTER_LENGTH,
            seed=0,
            seq_length=MASTER_LENGTH,
            dtype=dtype,  # type: ignore[arg-type]
            trainable_parameters=sum(tensor.numel() for tensor in trainable_state(model).values()),
            version="0",
        )
        save_adapter(folder / "adapter", trainable_state(model), file)
        return TrainedRun(folder, base, model.eval())

    return make


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers copy modelling code to a folder of the test's, not to the user's."""
    for module in ("dynamic_module_utils", "utils.hub", "utils"):
        name = f"transformers.{module}.HF_MODULES_CACHE"
        monkeypatch.setattr(name, str(tmp_path / "modules"), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
