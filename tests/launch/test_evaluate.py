"""``launch/evaluate.py`` as users start it: what it measures, what it writes, and with mistakes."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import save_adapted
from rank_processes import process_environment
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama import cli
from sparse_llama.config.bundled import resolve_bundled
from sparse_llama.config.settings import DataSettings, Settings
from sparse_llama.data.prepare import prepare_data
from sparse_llama.evaluation.loss import mean_token_loss
from sparse_llama.model.assemble import open_model
from sparse_llama.model.objective import TokenLoss

ROOT = Path(__file__).parents[2]
BASE = "bundled:tiny-llama"
SPARSE = {"mode": "local_sliding_window", "block": 16, "num_sliding_window_blocks": 3}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that trained a sparse v2 adapter."""
    folder = tmp_path_factory.mktemp("run")
    save_adapted(folder / "adapter", BASE, version="v2", block=SPARSE)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Mira lives in Oslo. She has a cat.\nTom is a baker.\n" * 12, encoding="utf-8")
    return path


def evaluate(*arguments: str | Path) -> None:
    cli.main(cli.evaluate, cli.evaluate_parser("doc"), [str(argument) for argument in arguments])


def measure(tmp_path: Path, *arguments: str | Path) -> dict[str, Any]:
    evaluate(*arguments, "--json", tmp_path / "result.json")
    return json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))


def test_the_script_runs_without_a_launcher_and_measures_what_transformers_does(text, tmp_path):
    out = tmp_path / "deep" / "result.json"
    command = ["--model", BASE, "--data", str(text), "--window", "64", "--stride", "32", "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "launch/evaluate.py", *command, "--local_rank", "0", "--json", str(out)],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    folder = resolve_bundled(BASE)
    assert folder is not None
    opened = open_model(BASE)
    ids = [opened.tokenizer.bos_id, *opened.tokenizer.encode(text.read_text(encoding="utf-8"))]
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, scored, first = 0.0, 0, 0
    while scored < len(ids) - 1:
        last = min(first + 64, len(ids) - 1)
        with torch.no_grad():
            logits = theirs(torch.tensor([ids[first:last]])).logits[0].double()
        losses = -logits.log_softmax(-1).gather(1, torch.tensor(ids[first + 1 : last + 1])[:, None])
        total, scored, first = total + float(losses[scored - first :].sum()), last, first + 32
    assert result["tokens"] == len(ids) - 1
    assert result["nll_per_token"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-5)
    expected = {
        "measured": "text",
        "window": 64,
        "stride": 32,
        "dtype": "float32",
        "model": BASE,
        "adapter": None,
    }
    assert {name: result[name] for name in expected} == expected
    assert {"versions", "device", "git_commit", "data", "source", "bos", "elapsed_s"} <= result.keys()
    assert f"{result['perplexity']:.4f}" in done.stdout
    assert "window 64, stride 32" in done.stdout


def test_a_sparse_adapter_on_records_has_the_loss_that_training_validates(run_folder, tmp_path):
    """There packed in rows, here one by one; the layout is the adapter's in both."""
    result = measure(tmp_path, "--adapter", run_folder, "--data", "bundled:people")
    opened = open_model(BASE, run_folder / "adapter")
    settings = Settings(seq_length=256, data=DataSettings(dataset="bundled:people"))
    data = prepare_data(settings, opened.tokenizer, align=16, micro_batch_size=4, rank=0, world_size=1)
    model: Any = opened.model
    expected = mean_token_loss(TokenLoss(model), data.validation_batches)
    assert result["nll_per_token"] == pytest.approx(expected, rel=1e-5)
    assert result["tokens"] == sum(batch.num_labelled for batch in data.validation_batches)
    assert result["measured"] == "responses"
    assert result["stride"] is None
    assert result["records"]["records"] == 180
    assert "local_sliding_window" in result["attention"]
    dense = measure(tmp_path, "--model", BASE, "--data", "bundled:people", "--dtype", "float32")
    assert dense["nll_per_token"] != pytest.approx(expected, rel=1e-3)


def test_the_window_is_the_adapters_length_if_none_is_asked_for(run_folder, text, tmp_path):
    result = measure(tmp_path, "--adapter", run_folder, "--data", text)
    assert (result["window"], result["stride"]) == (256, 256)
    result = measure(tmp_path, "--model", BASE, "--data", text)
    assert (result["window"], result["dtype"]) == (2048, "bfloat16")  # config.json of the bundled model


def test_the_harness_partition_scores_every_token_of_every_document(tmp_path, capsys):
    """``tests/evaluation`` compares the numbers with lm-eval's."""
    documents = ["Mira lives in Oslo. " * 9, "Tom is a baker."]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    result = measure(tmp_path, "--model", BASE, "--data", path, "--window", "16", "--partition", "harness")
    encode = open_model(BASE).tokenizer.encode
    assert result["tokens"] == sum(len(encode(text)) for text in documents)
    assert (result["partition"], result["stride"]) == ("harness", None)
    assert result["words"] == sum(len(text.split(" ")) for text in documents)
    assert result["word_perplexity"] == pytest.approx(math.exp(result["loss_sum"] / result["words"]))
    shown = capsys.readouterr().out
    assert "lm-evaluation-harness's windows of 16, each document" in shown
    assert f"{result['word_perplexity']:,.4f} ({result['words']} words)" in shown


def test_perplexity_by_position_is_shown_written_and_drawn(text, tmp_path, capsys):
    picture = tmp_path / "deep" / "positions.png"
    result = measure(
        tmp_path, "--model", BASE, "--data", text, "--window", "64", "--by_position", "4", "--png", picture
    )
    ranges = result["by_position"]
    assert [(part["first"], part["last"]) for part in ranges] == [(1, 16), (17, 32), (33, 48), (49, 64)]
    assert sum(part["tokens"] for part in ranges) == result["tokens"]
    total = sum(part["tokens"] * part["nll_per_token"] for part in ranges)
    assert total == pytest.approx(result["loss_sum"])
    shown = capsys.readouterr().out
    assert all(f"{part['perplexity']:.4f}" in shown for part in ranges)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert measure(tmp_path, "--model", BASE, "--data", text)["by_position"] is None


def test_answers_are_compared_and_written_if_asked_for(run_folder, tmp_path, capsys):
    file = tmp_path / "deep" / "answers.jsonl"
    flags = ["--exact_match", "6", "--max_new_tokens", "5", "--answers", file]
    result = measure(tmp_path, "--adapter", run_folder, "--data", "bundled:people", *flags)
    answers = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == result["exact_match"]["records"] == result["rouge_l"]["records"] == 6
    for name, value in (("exact_match", "exact"), ("rouge_l", "rouge_l")):
        for category, mean in result[name]["by_category"].items():
            values = [answer[value] for answer in answers if answer["category"] == category]
            assert mean == pytest.approx(sum(values) / len(values))
        assert 0 <= result[name]["average"] <= 1
    assert len(result["rouge_l"]["by_category"]) > 1
    shown = capsys.readouterr().out
    assert "exact match" in shown
    assert f"{result['rouge_l']['average']:.3f}" in shown


def test_skipped_records_are_shown(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    path.write_text('{"instruction": "Who?", "response": "Ann is."}\n{\n', encoding="utf-8")
    evaluate("--model", BASE, "--data", path)
    shown = "".join(capsys.readouterr().out.split())
    assert "line2:notJSON" in shown
    assert "1;0truncated" in shown


def test_a_base_that_was_never_loaded_is_refused(tmp_path, text, capsys):
    """T3: its perplexity would be printed as exactly V."""
    folder = resolve_bundled(BASE)
    assert folder is not None
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    with pytest.raises(SystemExit) as ended:
        evaluate("--model", tmp_path / "model", "--data", text)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert "constant logits" in captured.err
    assert "perplexity" not in captured.out


def test_a_base_of_random_weights_is_refused_instead_of_printing_a_perplexity(tmp_path, text, capsys):
    """Its logits differ from word to word, and mean nothing: what transformers makes of a checkpoint whose
    names it does not know."""
    folder = resolve_bundled(BASE)
    assert folder is not None
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    with pytest.raises(SystemExit) as ended:
        evaluate("--model", tmp_path / "model", "--data", text)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert "where guessing among 1,344 gives 1,344: a broken run" in captured.err
    assert "perplexity" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", BASE, "--data", "wikitxt2"],
            "--data: no file and no corpus is called 'wikitxt2'; did you mean",
        ),
        (["--model", BASE, "--data", "missing.txt"], "missing.txt: no such file or folder"),
        (["--model", BASE, "--data", "wikitext2"], "--data wikitext2: not available from the hub"),
        (
            ["--model", BASE, "--data", "bundled:people", "--stride", "4"],
            "--stride: bundled:people holds records",
        ),
        (
            ["--model", BASE, "--data", "TEXT", "--exact_match", "4"],
            "--exact_match: .* is text without questions",
        ),
        (["--model", BASE, "--data", "TEXT", "--exact_match", "-1"], "--exact_match: must be 0 .* got -1"),
        (
            ["--model", BASE, "--data", "TEXT", "--window", "4096"],
            "--window: must be from 1 to 2048, the max_position",
        ),
        (
            ["--adapter", "RUN", "--data", "TEXT", "--window", "2049"],
            "--window: must be from 1 to 2048, the max_position",
        ),
        (
            ["--model", BASE, "--data", "TEXT", "--window", "8", "--stride", "9"],
            "--stride: must be from 1 to the win",
        ),
        (
            ["--model", BASE, "--data", "bundled:people", "--partition", "harness"],
            "--partition: bundled:people holds records",
        ),
        (
            ["--model", BASE, "--data", "TEXT", "--partition", "harness", "--stride", "4"],
            "--stride: --partition harness has windows of its own; leave one",
        ),
        (
            ["--model", BASE, "--data", "TEXT", "--by_position", "0"],
            "--by_position: must be .* got 0$",
        ),
        (
            ["--model", BASE, "--data", "TEXT", "--png", "x.png"],
            "--png: there is nothing to draw; add",
        ),
        (["--model", BASE, "--data", "TEXT", "--by_position", "--png", "."], r"--png \.: cannot be written"),
        (["--adapter", "missing", "--data", "TEXT"], "missing: no such file or folder"),
        (["--model", "missing/model/x", "--data", "TEXT"], "missing/model/x: no such folder"),
        (["--data", "TEXT"], "no model to open; give --model, --adapter, or both"),
        (["--model", BASE], "--data"),
        (["--model", BASE, "--data", "TEXT", "--json", "."], r"--json \.: cannot be written"),
        (
            ["--model", BASE, "--data", "TEXT", "--stide", "4"],
            r"--stide: unknown flag; did you mean '--stride'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run_folder, text, capsys, arguments, message):
    places = {"TEXT": str(text), "RUN": str(run_folder)}
    with pytest.raises(SystemExit) as ended:
        evaluate(*[places.get(argument) or argument for argument in arguments])
    assert ended.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert re.search(message, said[0]), said[0]
