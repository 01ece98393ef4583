"""A run with the tokenizer's chat template, from its first step to an answer: nobody has to name it twice."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizers import SHORT, write_sentencepiece

from sparse_llama import cli
from sparse_llama.adapters.bank import require_bank
from sparse_llama.adapters.stored import load_adapter, save_adapter
from sparse_llama.adapters.weights import read_adapter_config
from sparse_llama.config.bundled import DATASETS, MODELS
from sparse_llama.config.run import Overrides, load_run
from sparse_llama.data.split import split_indices
from sparse_llama.errors import DataError
from sparse_llama.generation import generate_batch
from sparse_llama.model.assemble import open_model
from sparse_llama.model.llama import load_llama
from sparse_llama.training.loop import fit

QUESTION = "Where does Tom live?"
PROMPT = f"<s>### Instruction:\n{QUESTION}\n\n### Response:\n"


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled base with a chat template of words that it knows."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(MODELS["bundled:tiny-llama"], folder, dirs_exist_ok=True)
    return write_sentencepiece(folder, SHORT)


@pytest.fixture(scope="module")
def run_folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("template")
    records = DATASETS["bundled:people"] / "validation.jsonl"
    lines = records.read_text(encoding="utf-8").splitlines()[:30]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    document = {
        "train_micro_batch_size_per_gpu": 2,
        "sparse_llama": {
            "seq_length": 128,
            "model": {"path": str(base)},
            "data": {"dataset": str(folder / "a.jsonl"), "template": "tokenizer"},
            "training": {"steps": 2, "max_new_tokens": 4},
        },
    }
    (folder / "run.json").write_text(json.dumps(document), encoding="utf-8")
    fit(load_run(folder / "run.json", Overrides(output_dir=folder / "out"), 1))
    return folder / "out"


def test_the_adapter_and_the_record_of_the_run_say_which_template_it_was(run_folder: Path):
    assert read_adapter_config(run_folder / "adapter").template == "tokenizer"
    assert read_json(run_folder / "run.json")["sparse_llama"]["data"]["template"] == "tokenizer"


def test_generation_asks_in_the_template_of_training(run_folder: Path, capsys):
    """The prompt is written out by hand."""
    opened = open_model(None, run_folder / "adapter")
    (expected,) = generate_batch(opened.model, opened.templated, [PROMPT], 12)
    arguments = ["--adapter", str(run_folder), "--prompt", QUESTION, "--max_new_tokens", "12"]
    cli.main(cli.generate, cli.generate_parser("doc"), arguments)
    assert capsys.readouterr().out == f"{expected}\n"
    assert expected.strip()


def test_evaluation_measures_the_losses_of_training(run_folder: Path, tmp_path: Path):
    """Packed or one by one, the responses of the same records in the same template."""
    summary, record = read_json(run_folder / "summary.json"), read_json(run_folder / "run.json")
    lines = Path(record["sparse_llama"]["data"]["dataset"]).read_text(encoding="utf-8").splitlines()
    _, held_out = split_indices(30, 1, 42)
    (tmp_path / "held.jsonl").write_text("\n".join(lines[index] for index in held_out), encoding="utf-8")
    arguments = ["--adapter", str(run_folder), "--data", str(tmp_path / "held.jsonl")]
    cli.main(cli.evaluate, cli.evaluate_parser("doc"), [*arguments, "--json", str(tmp_path / "a.json")])
    found = read_json(tmp_path / "a.json")
    assert found["template"] == "tokenizer"
    assert found["tokens"] == summary["data"]["validation"]["tokens_labelled"]
    assert found["nll_per_token"] == pytest.approx(summary["validation_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--template", "alpaca"], "was trained with template tokenizer; leave it out"),
        (["--template", "tokenizer", "--raw"], "--template: is what --raw leaves out; give one of them"),
        (["--context", "</s>"], "--prompt: messages[0]: holds '</s>', which the chat template would take"),
    ],
)
def test_another_template_than_that_of_training_is_refused(run_folder: Path, capsys, flags, message):
    arguments = ["--adapter", str(run_folder), "--prompt", QUESTION, *flags]
    with pytest.raises(SystemExit) as ended:
        cli.main(cli.generate, cli.generate_parser("doc"), arguments)
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


def test_a_run_that_goes_on_from_another_template_says_so(run_folder: Path, tmp_path: Path, capsys):
    """From an adapter, and from a checkpoint."""
    settings = read_json(run_folder / "run.json")["sparse_llama"]
    data = settings["data"] | {"template": "alpaca"}
    block = {"seq_length": 128, "model": {"path": settings["model"]["path"]}, "data": data}
    for name, start in (
        ("from_adapter", {"init_adapter": str(run_folder)}),
        ("from_checkpoint", {}),
    ):
        training = {"steps": 3, "samples": 0} | start
        document = {"train_micro_batch_size_per_gpu": 2, "sparse_llama": block | {"training": training}}
        (tmp_path / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    fit(load_run(tmp_path / "from_adapter.json", Overrides(output_dir=tmp_path / "one"), 1))
    said = " ".join(capsys.readouterr().out.split())
    assert f"{run_folder}: was trained with template tokenizer, this run writes alpaca" in said
    resume = Overrides(output_dir=tmp_path / "two", resume=run_folder / "checkpoints" / "step_000002")
    fit(load_run(tmp_path / "from_checkpoint.json", resume, 1))
    said = " ".join(capsys.readouterr().out.split())
    assert "note: it was trained with template tokenizer, this run goes on with alpaca" in said
    assert read_adapter_config(tmp_path / "two" / "adapter").template == "alpaca"


def test_a_base_alone_answers_in_the_template_that_is_asked_for(base: Path, capsys):
    opened = open_model(str(base), template="tokenizer")
    (expected,) = generate_batch(opened.model, opened.templated, [PROMPT], 8)
    arguments = ["--model", str(base), "--prompt", QUESTION, "--max_new_tokens", "8"]
    cli.main(cli.generate, cli.generate_parser("doc"), [*arguments, "--template", "tokenizer"])
    assert capsys.readouterr().out == f"{expected}\n"


def test_an_adapter_keeps_its_template_when_it_is_loaded_and_saved_again(
    run_folder: Path, base: Path, tmp_path: Path
):
    model = load_llama(str(base), dtype=torch.float32).model
    load_adapter(model, run_folder)
    assert require_bank(model).adapters["default"].template == "tokenizer"
    save_adapter(model, tmp_path / "again", base_model=str(base))
    assert read_adapter_config(tmp_path / "again").template == "tokenizer"


def test_an_export_says_its_template_too(run_folder: Path, tmp_path: Path):
    flags = ["--checkpoint", str(run_folder), "--output", str(tmp_path / "export")]
    cli.main(cli.export, cli.export_parser("doc"), flags)
    assert open_model(str(tmp_path / "export")).template == "tokenizer"


def test_a_tokenizer_without_a_template_is_said_before_the_model_loads(tmp_path: Path):
    document = {
        "train_micro_batch_size_per_gpu": 2,
        "sparse_llama": {"data": {"template": "tokenizer"}, "training": {"steps": 1}},
    }
    (tmp_path / "run.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"sparse_llama\.data\.template: the tokenizer in .* has no chat temp"
    ):
        fit(load_run(tmp_path / "run.json", Overrides(output_dir=tmp_path / "out"), 1))
