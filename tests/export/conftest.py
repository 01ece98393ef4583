"""What the tests of exporting share: a run on disk, and a place for the code that transformers copies."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import adapt, trainable_state
from exported_runs import BUNDLED, MASTER_LENGTH, VOCAB_SIZE, TrainedRun
from transformers import LlamaForCausalLM

from sparse_llama.adapters.weights import AdapterFile, BaseModelReference, write_adapter_folder
from sparse_llama.config.settings import AdapterSettings, Settings
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.export import reopen

RECORDS = [
    {"instruction": f"Add {number}.", "response": " ".join(map(str, range(number)))}
    for number in range(2, 12)
]


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
        adapter: dict[str, Any] | None = None,
        max_shard_size: str = "1GB",
        **overrides: Any,
    ) -> TrainedRun:
        base, folder = tmp_path / "base", tmp_path / "run"
        model = tiny_llama(vocab_size=VOCAB_SIZE, **overrides)
        model.save_pretrained(base, max_shard_size=max_shard_size)
        shutil.copyfile(BUNDLED / "tokenizer.model", base / "tokenizer.model")
        sparsity = None if layout is None else parse_sparsity(layout)
        variant: dict[str, Any] = adapter or {}
        start_layer = None if "top_layers" in variant else 2
        adapt(
            model, version, sparsity=sparsity, dense_layers=dense_layers, start_layer=start_layer, **variant
        )
        with torch.no_grad():
            change(model)
        file = AdapterFile(
            base_model=BaseModelReference(path=str(base)),
            adapter=AdapterSettings(version=version, prompt_length=3, **variant),  # type: ignore[arg-type]
            sparse_attention=layout,
            dense_layers=dense_layers,
            master_length=MASTER_LENGTH,
            seed=0,
            seq_length=MASTER_LENGTH,
            dtype=dtype,  # type: ignore[arg-type]
            trainable_parameters=sum(tensor.numel() for tensor in trainable_state(model).values()),
            version="0",
        )
        write_adapter_folder(folder / "adapter", trainable_state(model), file)
        return TrainedRun(folder, base, model.eval())

    return make


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers copy modelling code to a folder of the test's, not to the user's."""
    for module in ("dynamic_module_utils", "utils.hub", "utils"):
        name = f"transformers.{module}.HF_MODULES_CACHE"
        monkeypatch.setattr(name, str(tmp_path / "modules"), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture(autouse=True)
def opened_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open exports in this process, in a hundredth of the time; ``fresh_process`` leaves it as it is."""
    if "fresh_process" not in request.fixturenames:
        monkeypatch.setattr("sparse_llama.export.agreement.measure_elsewhere", reopen.measure_folder)


@pytest.fixture
def fresh_process() -> None:
    """Let the exporter open its exports in a process of their own."""


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Return the path of a data set of ten records, two of which validate."""
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def settings(data_file: Path) -> Settings:
    """Return the settings of a run on that data set."""
    data = {"dataset": str(data_file), "validation_records": 2, "split_seed": 1}
    return Settings.parse({"seq_length": MASTER_LENGTH, "data": data})


@pytest.fixture
def write_run_json(settings: Settings) -> Callable[[Path], None]:
    """Return a function that writes what an export reads of the ``run.json`` that training leaves."""

    def write(folder: Path) -> None:
        document = {"sparse_llama": settings.model_dump(mode="json")}
        (folder / "run.json").write_text(json.dumps(document))

    return write
