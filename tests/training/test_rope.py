"""Runs beyond the base's range: refused before anything is read, or stretched, and whoever comes after
knows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from training.conftest import REMOVED, train_in, write_configuration

from sparse_llama.adapters.weights import read_adapter_config
from sparse_llama.config.run import Overrides, load_run
from sparse_llama.data.prepare import prepare_data
from sparse_llama.errors import ConfigError, ModelError
from sparse_llama.evaluation.evaluate import default_window, evaluate
from sparse_llama.evaluation.loss import mean_token_loss
from sparse_llama.generation import generate_stream, longest_sequence
from sparse_llama.model.assemble import OpenedModel, open_model
from sparse_llama.model.objective import TokenLoss
from sparse_llama.training.loop import fit

Train = Callable[..., Path]
RANGE, LENGTH = 512, 768  # of the base, and of the runs
FIXED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": LENGTH / RANGE,
    "original_max_position_embeddings": RANGE,
}
TOLD = "positions by yarn, factor 1.5, rope_theta 10000.0, original_max_position_embeddings 512"


def long(rope: dict[str, Any] | None, **training: Any) -> dict[str, Any]:
    """Return the ``sparse_llama`` block of a short run of long rows."""
    model: dict[str, Any] = {"random_weights": False} | ({} if rope is None else {"rope_parameters": rope})
    return {"seq_length": LENGTH, "model": model, "training": {"steps": 3} | training}


def auto(kind: str) -> dict[str, Any]:
    return {"rope_type": kind, "factor": "auto"}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def words(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed, in one line."""
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def place(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workplace, with a base whose attention looks at positions: as it is drawn it looks at all alike."""
    folder = tmp_path_factory.mktemp("sharp") / "place"
    shutil.copytree(workplace, folder)
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("_proj.weight"):
            tensors[name] *= 8
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def stretched(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stretched by yarn."""
    return train_in(place, tmp_path_factory.mktemp("yarn"))("run", sparse_llama=long(auto("yarn"), samples=1))


@pytest.fixture
def train_here(place: Path, tmp_path: Path) -> Train:
    return train_in(place, tmp_path)


@pytest.fixture(scope="module")
def opened(stretched: Path) -> OpenedModel:
    return open_model(None, stretched / "adapter")


@pytest.fixture
def unstretched(stretched: Path, tmp_path: Path) -> OpenedModel:
    """The same adapter without its positions."""
    shutil.copytree(stretched / "adapter", tmp_path / "old")
    path = tmp_path / "old" / "adapter_config.json"
    document = read_json(path)
    del document["rope_parameters"]
    path.write_text(json.dumps(document), encoding="utf-8")
    return open_model(None, tmp_path / "old")


def validation_loss(opened: OpenedModel, folder: Path) -> float:
    """Return the loss of a run's validation data under a model that was opened to be used."""
    file = Path(read_json(folder / "run.json")["config_path"])
    run = load_run(file, Overrides(output_dir=folder, overwrite=True), 1)
    data = prepare_data(run.settings, opened.tokenizer, align=16, micro_batch_size=2, rank=0, world_size=1)
    model: Any = opened.model
    return mean_token_loss(TokenLoss(model), data.validation_batches)


def test_a_run_that_is_too_long_ends_before_data_and_weights_are_read(train_here, place, tmp_path):
    data = {"dataset": str(tmp_path / "missing.jsonl")}
    line = f"seq_length: 768 tokens, but {place / 'model'} was made for 512 positions"
    with pytest.raises(ConfigError, match=line):
        train_here("run", sparse_llama=long(None) | {"data": data})
    assert not (tmp_path / "run").exists()


def test_random_weights_need_no_word_about_positions(train_here):
    folder = train_here("run", sparse_llama=long(None) | {"model": {"random_weights": True}})
    assert read_adapter_config(folder / "adapter").rope_parameters is None
    assert read_json(folder / "run.json")["max_position_embeddings"] == LENGTH


def test_the_run_the_adapter_and_every_checkpoint_name_the_positions(stretched: Path):
    record = read_json(stretched / "run.json")
    assert record["sparse_llama"]["model"]["rope_parameters"] == auto("yarn")
    assert record["rope_parameters"] == FIXED
    assert record["max_position_embeddings"] == LENGTH
    (checkpoint,) = (stretched / "checkpoints").glob("step_*")
    for folder in (stretched / "adapter", checkpoint):
        assert read_json(folder / "adapter_config.json")["rope_parameters"] == FIXED


def test_evaluation_reads_as_far_as_the_run_did(opened, unstretched, tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("the big house of someone far away. " * 200, encoding="utf-8")
    assert (default_window(opened), default_window(unstretched)) == (LENGTH, RANGE)
    result = evaluate(opened, str(held_out))
    assert result.window == LENGTH
    assert result.positions.startswith("768: yarn, factor 1.5")
    with pytest.raises(ConfigError, match="--window: must be from 1 to 512"):
        evaluate(unstretched, str(held_out), window=LENGTH)


def test_generation_goes_as_far_as_the_run_did(opened, unstretched):
    assert longest_sequence(opened.model) == (LENGTH, "max_position_embeddings of the model")
    prompt = "far away " * 90
    assert RANGE < len(opened.tokenizer.encode(prompt)) < LENGTH - 5
    list(generate_stream(opened.model, opened.tokenizer, prompt, max_new_tokens=3))
    with pytest.raises(ModelError, match="512, the max_position_embeddings of the model"):
        generate_stream(unstretched.model, unstretched.tokenizer, prompt, max_new_tokens=3)


def test_a_model_that_is_opened_has_the_loss_that_training_validates(stretched, opened, unstretched):
    expected = read_json(stretched / "summary.json")["validation_loss"]
    assert validation_loss(opened, stretched) == pytest.approx(expected, rel=1e-6)
    assert validation_loss(unstretched, stretched) != pytest.approx(expected, rel=2e-5)


def test_a_dynamic_run_is_opened_at_its_length(train_here):
    """Rows are packed here with shorter documents, by which transformers' own module would turn."""
    folder = train_here("run", sparse_llama=long(auto("dynamic")))
    opened = open_model(None, folder / "adapter")
    # NTK-aware scaling, s = 1.5: s^2 - s + 1 to the power of D / (D - 2), and D is 8
    expected = {"rope_type": "default", "rope_theta": pytest.approx(1e4 * 1.75 ** (8 / 6))}
    assert read_json(folder / "adapter" / "adapter_config.json")["rope_parameters"] == expected
    loss = read_json(folder / "summary.json")["validation_loss"]
    assert validation_loss(opened, folder) == pytest.approx(loss, rel=1e-6)


def test_a_run_that_goes_on_from_other_positions_says_so(stretched, train_here, capsys):
    block = long({"rope_type": "linear", "factor": 2}, init_adapter=str(stretched)) | {"adapter": REMOVED}
    train_here("next", sparse_llama=block)
    line = f"{stretched}: was trained with {TOLD}, this run has positions by linear, factor 2.0, rope_theta"
    assert line in words(capsys)


def test_a_resumed_run_says_its_positions_and_what_they_were(stretched, train_here, tmp_path, capsys):
    shutil.copytree(stretched, tmp_path / "run")
    train_here("run", {"resume": "auto", "steps": 4}, sparse_llama=long(auto("yarn")))
    printed = words(capsys)
    assert f"positions {LENGTH}: yarn, factor 1.5, rope_theta 10000.0" in printed
    assert "it was trained with" not in printed
    train_here("run", {"resume": "auto", "steps": 5}, sparse_llama=long({"rope_type": "linear", "factor": 2}))
    line = f"note: it was trained with {TOLD}, this run goes on with positions by linear, factor 2.0"
    assert line in words(capsys)
    assert read_json(tmp_path / "run" / "run.json")["max_position_embeddings"] == 2 * RANGE


def test_the_flag_stretches_a_run_that_would_be_refused(place: Path, tmp_path: Path):
    file = write_configuration(place, tmp_path, {"sparse_llama": long(None)})
    fit(load_run(file, Overrides(output_dir=tmp_path / "run", rope="yarn"), world_size=1))
    found = read_adapter_config(tmp_path / "run" / "adapter").rope_parameters
    assert found is not None
    assert found.to_transformers() == FIXED
