"""``launch/inspect_data.py`` as users start it: what is in the data, what becomes of it, and how it looks."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from rank_processes import process_environment

from sparse_llama import cli
from sparse_llama.config.bundled import DATASETS
from sparse_llama.data.encode import encode_turns
from sparse_llama.data.records import parse_record
from sparse_llama.data.tokenizer import load_tokenizer
from sparse_llama.model.files import resolve_model

ROOT = Path(__file__).parents[2]
PEOPLE = DATASETS["bundled:people"] / "train.jsonl"


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return what the command prints."""
    cli.main(cli.inspect_data, cli.inspect_data_parser("doc"), [str(argument) for argument in arguments])
    return capsys.readouterr().out


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, *responses: str) -> Path:
    lines = [json.dumps({"instruction": "Say it.", "response": response}) for response in responses]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_the_script_works_at_once_and_without_a_terminal_marks_what_is_learned():
    done = subprocess.run(
        [sys.executable, "launch/inspect_data.py"],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    documents = done.stdout.split("stands between [[ and ]]\n")[1]
    assert documents.count("<s>Below is an instruction") == documents.count("[[") == 3
    answers = re.findall(r"### Response:\n\[\[(.*)</s>\]\]", documents)
    known = {json.loads(line)["response"] for line in PEOPLE.read_text(encoding="utf-8").splitlines()}
    assert len(answers) == 3
    assert set(answers) <= known


def test_the_numbers_are_those_of_the_records(capsys, tmp_path: Path):
    """Counted and tokenised here, percentiles by numpy."""
    records = [json.loads(line) for line in PEOPLE.read_text(encoding="utf-8").splitlines()]
    tokenizer = load_tokenizer(resolve_model("bundled:tiny-llama"))
    lengths = [len(encode_turns(parse_record(record), tokenizer).ids) for record in records]
    printed = inspect(capsys, "--records", 0, "--json", tmp_path / "a.json")
    found = read_json(tmp_path / "a.json")
    training = found["data"]["training"]
    points = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    expected = {name: numpy.percentile(lengths, at, method="inverted_cdf") for name, at in points.items()}
    assert training["lengths"] == expected
    counts = {record["category"]: 0 for record in records}
    for record in records:
        counts[record["category"]] += 1
    assert training["categories"] == counts
    assert [one["records"] for one in found["histogram"]] == [
        sum(one["first"] <= length <= one["last"] for length in lengths) for one in found["histogram"]
    ]
    for name, count in counts.items():
        assert re.search(rf"^ {name} +{count} +60", printed, flags=re.MULTILINE)
    assert f"{expected['p50']:.0f} tokens at the median, {expected['p90']:.0f} at 90%" in printed
    assert found["warnings"] == []
    assert "[[" not in printed


def test_records_that_are_too_long_are_warned_of(capsys, tmp_path: Path):
    """Of 19 that train 2 are cut, which are 11%; one in twenty would be let pass."""
    path = write(tmp_path / "train.jsonl", *(["Ann."] * 17), *(["Ann " * 300] * 2))
    write(tmp_path / "validation.jsonl", "Ann.")
    printed = inspect(capsys, "--dataset", tmp_path, "--seq_length", 128)
    said = " ".join(printed.split())
    assert (
        "warning: 2 of 19 training records (11%) are longer than 128 tokens: 2 lose their ends, "
        "0 are dropped; use a longer sparse_llama.seq_length" in said
    )
    assert "longer than 128" in printed
    write(path, *(["Ann."] * 19), "Ann " * 300)
    assert "warning" not in inspect(capsys, "--dataset", tmp_path, "--seq_length", 128)


def test_colours_say_what_is_learned_on_a_terminal_unless_none_are_wanted(capsys, tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", "It is Ann.")
    write(tmp_path / "validation.jsonl", "Ann.")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    arguments = ("--dataset", tmp_path, "--seq_length", 128)
    shown = inspect(capsys, *arguments)
    assert "\x1b[1;32mIt is Ann.</s>\x1b[0m" in shown
    assert "[[" not in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[It is Ann.</s>]]" in inspect(capsys, *arguments)


def test_a_finished_run_is_no_obstacle_and_a_document_for_two_processes_none_either(capsys, tmp_path: Path):
    document = {
        "train_micro_batch_size_per_gpu": 1,
        "sequence_parallel_size": 2,
        "sparse_llama": {"seq_length": 256},
    }
    (tmp_path / "shared.json").write_text(json.dumps(document), encoding="utf-8")
    assert "bundled:people" in inspect(capsys, "--ds_config", tmp_path / "shared.json", "--records", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--records", "-1"], "--records: must be 0 (none) or above, got -1"),
        (["--dataset", "missing.jsonl"], "missing.jsonl: no such file or folder"),
        (["--model", "./missing"], "./missing: no such folder"),
        (["--seq_length", "8"], "no training record leaves room"),
        (["--zero_stage", "3"], "--zero_stage: unknown flag"),
        (["--json", "."], "--json .: cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, arguments: list[str], message: str):
    with pytest.raises(SystemExit) as ended:
        inspect(capsys, *arguments)
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "count"),
    [("dolly-sample.jsonl", 151), ("alpaca-sample.json", 999), ("c4-sample.jsonl", 300)],
)
def test_real_records_are_all_accounted_for(shared: Path, capsys, tmp_path: Path, name: str, count: int):
    path = shared / "data" / name
    arguments = ("--dataset", path, "--seq_length", 1024, "--records", 2, "--json", tmp_path / "a.json")
    printed = inspect(capsys, *arguments)
    data = read_json(tmp_path / "a.json")["data"]
    parts = data["training"], data["validation"]
    assert sum(part["records"] for part in parts) + len(data["malformed"]) == count
    for part in parts:
        held = part["tokens_labelled"] + part["tokens_masked"]
        assert part["tokens_read"] + part["tokens_repeated"] == held + part["tokens_dropped"]
        assert part["lengths"]["p50"] <= part["lengths"]["p90"] <= part["lengths"]["max"]
    assert sum(one["records"] for one in read_json(tmp_path / "a.json")["histogram"]) == parts[0]["records"]
    assert printed.count("]]") >= 2
    if name.startswith("c4"):  # long texts are cut into pieces, and nothing of them is lost
        assert parts[0]["texts_cut"] > 0
        assert parts[0]["tokens_dropped"] == 0
        assert "texts cut into pieces" in " ".join(printed.split())


@pytest.mark.real_data
def test_a_text_is_one_record_in_pieces(shared: Path, capsys, tmp_path: Path):
    text = shared / "data" / "tinystories-sample.txt"
    inspect(capsys, "--dataset", text, "--json", tmp_path / "a.json")
    training = read_json(tmp_path / "a.json")["data"]["training"]
    assert (training["records"], training["texts_cut"], training["dropped"]) == (1, 1, 0)
    assert training["lengths"]["max"] == training["tokens_read"]
