"""Seeded mutations of every shipped document: each is a run that could start, or is refused in one line."""

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_table import FaultsRecord
from json_mutations import JUNK, damaged, misspelt, mutated, without_comments
from shipped_documents import DOCUMENTS, FOLDER, processes_of

from sparse_llama import cli
from sparse_llama.config.run import Overrides, Run, load_run
from sparse_llama.config.schedule import learning_rate
from sparse_llama.config.section import join_path
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import build_layout
from sparse_llama.study.runs import Study
from sparse_llama.study.settings import read_study

FEW = 15
"""Mutations of a document in every run of the tests; with ``-m faults`` there are ``MANY``."""
MANY = 2000
AMOUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.faults)]
MOST_CHARACTERS, MOST_SECONDS = 600, 2.0
NUM_HEADS, NUM_LAYERS, MOST_BLOCKS = 4, 8, 128
STUDIES = sorted((FOLDER / "studies").glob("*.json"))
FLAGS: list[dict[str, Any]] = [
    {}, {}, {"zero_stage": 3, "offload": "cpu"}, {"steps": 3}, {"epochs": 1, "lr": 1e-4},
    {"attention": "dense"}, {"seq_length": 64, "seed": 5},
    {"adapter": "v1", "model": "a/b", "dataset": "c/d"}, {"zero_stage": 1},
    {"micro_batch_size": 1, "checkpointing": "cpu", "loss_tile": 0},
    {"rope": "linear", "attention": "sparse"},
]  # fmt: skip


def refusal(action: Callable[[], object], file: Path) -> str | None:
    """Return the line that refuses ``file``; None if it is accepted."""
    begun = time.perf_counter()
    try:
        action()
        line = None
    except ConfigError as error:
        line = str(error)
        assert line.startswith(f"{file}: ") or line.startswith("--"), line
        said = line.removeprefix(f"{file}: ")
        assert said.isascii(), said
        assert said.isprintable(), said
        assert 0 < len(said) < MOST_CHARACTERS, said
    assert time.perf_counter() - begun < MOST_SECONDS
    return line


def assert_starts(run: Run) -> None:
    """Check what of a run can be checked without a model: what it saves, its layouts and its schedule."""
    text = json.dumps(run.to_json(), allow_nan=False)
    assert json.loads(text) == run.to_json()
    assert_layouts(run)
    if run.schedule is not None:
        assert_rates(run)


def assert_layouts(run: Run) -> None:
    length = run.settings.attention.master_length
    assert length is not None
    try:
        found = run.layouts.resolve(NUM_LAYERS)
    except ConfigError:  # names layers that this model has not, which it is told once it is known
        return
    for sparsity in set(found) - {None}:
        num_blocks = min(-(-length // sparsity.block), MOST_BLOCKS)
        if sparsity.num_blocks_needed()[1] <= num_blocks:
            assert 0 < build_layout(sparsity, NUM_HEADS, num_blocks).density <= 1


def assert_rates(run: Run) -> None:
    schedule = run.schedule
    assert schedule is not None
    steps = run.settings.training.steps or 20
    try:
        schedule = schedule.resolve(steps)
    except ConfigError:  # the warm-up is longer than these steps, which is known once the data are
        return
    rates = [learning_rate(schedule, step) for step in {*range(1, min(steps, 50) + 1), steps // 2 + 1, steps}]
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates), rates


def fuzz(
    contents: Iterator[bytes], accept: Callable[[Path, random.Random], object], file: Path, rng: random.Random
) -> tuple[int, int]:
    """Write each of ``contents`` to ``file`` and ask whether it is accepted; return how many were written and
    how many of them refused."""
    num_written = num_refused = 0
    for content in contents:
        file.write_bytes(content)
        num_written += 1
        num_refused += refusal(lambda: accept(file, rng), file) is not None
    return num_written, num_refused


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def accept_run(document: Path, folder: Path) -> Callable[[Path, random.Random], None]:
    """Return what accepts a changed ``document``: on any rank of any number of them, with any flags, a run
    that could start."""

    def accept(file: Path, rng: random.Random) -> None:
        flags = Overrides(output_dir=folder / "out", **rng.choice(FLAGS))
        ranks = rng.choice((processes_of(document), processes_of(document), 1, 2, 8))
        assert_starts(load_run(file, flags, ranks, is_main=rng.random() < 0.5, is_here=False))

    return accept


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_a_changed_document_is_a_run_or_refused_in_one_line(
    document: Path, amount: int, tmp_path: Path, faults_record: FaultsRecord
):
    """A run that is accepted and later ends in a traceback would be as bad as a traceback at once."""
    rng, plain = random.Random(20), without_comments(document)
    contents = (as_bytes(mutated(plain, rng)) for _ in range(amount))
    written, refused = fuzz(contents, accept_run(document, tmp_path), tmp_path / "mine.json", rng)
    assert 0 < refused <= written
    assert amount == FEW or refused < written  # some changes are another run
    faults_record("configuration: keys and values", injected=written, survived=written)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_a_damaged_document_is_refused_in_one_line_or_still_a_run(
    document: Path, amount: int, tmp_path: Path, faults_record: FaultsRecord
):
    rng, text = random.Random(22), document.read_text(encoding="utf-8")
    contents = (damaged(text, rng) for _ in range(amount))
    written, refused = fuzz(contents, accept_run(document, tmp_path), tmp_path / "mine.json", rng)
    assert refused > 0
    faults_record("configuration: damaged text", injected=written, survived=written)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_an_unknown_key_anywhere_is_refused_and_named(
    document: Path, amount: int, tmp_path: Path, faults_record: FaultsRecord
):
    """DeepSpeed passes over most of them: a misspelt batch size would train with another."""
    rng, plain, file = random.Random(21), without_comments(document), tmp_path / "mine.json"
    for _ in range(amount):
        text, path = misspelt(plain, rng)
        file.write_bytes(as_bytes(text))
        flags = Overrides(output_dir=tmp_path / "out")
        line = refusal(lambda: load_run(file, flags, processes_of(document), is_here=False), file)  # noqa: B023
        assert line is not None, path
        assert line.startswith(f"{file}: {join_path('', *path)}: "), line
    faults_record("configuration: unknown key", injected=amount, survived=amount)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("document", STUDIES, ids=lambda path: path.stem)
def test_a_changed_study_is_one_that_could_start_or_refused_in_one_line_that_names_it(
    document: Path, amount: int, tmp_path: Path, faults_record: FaultsRecord
):
    """And leaves nothing outside of its folder: variants name files."""
    rng, plain, text = random.Random(23), without_comments(document), document.read_text(encoding="utf-8")
    shutil.copytree(FOLDER, tmp_path / "ds_configs")
    file, output_dir = tmp_path / "ds_configs" / "studies" / "mine.json", tmp_path / "out"
    num_refused = 0
    for number in range(amount // 3):
        file.write_bytes(as_bytes(mutated(plain, rng)) if number % 4 else damaged(text, rng))
        try:
            study = Study("mine", read_study(file), file.parent, output_dir)
            assert len(study.all_runs()) >= len(study.check(is_anew=True)) > 0
        except ConfigError as error:
            line = str(error)
            num_refused += 1
            assert line.startswith((f"{file}: ", "mine: ")), line
            assert len(line.replace(str(tmp_path), "")) < MOST_CHARACTERS, line
            assert "\n" not in line or "\n" in text
    assert num_refused > 0
    assert {path.name for path in tmp_path.iterdir()} <= {"ds_configs", "out"}
    faults_record("study: keys, values and text", injected=amount // 3, survived=amount // 3)


@pytest.mark.faults
@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if processes_of(path) == 1], ids=lambda path: path.stem
)
def test_deepspeed_takes_every_changed_document_that_is_a_run(
    document: Path, tmp_path: Path, faults_record: FaultsRecord
):
    """Else the run would end in DeepSpeed's traceback once the model is loaded."""
    from deepspeed.runtime.config import DeepSpeedConfig  # seconds, and the others need none of it

    from sparse_llama.training.engine import engine_config

    rng, plain, file = random.Random(25), without_comments(document), tmp_path / "mine.json"
    flags, num_taken = Overrides(output_dir=tmp_path / "out"), 0
    for _ in range(MANY):
        file.write_bytes(as_bytes(mutated(plain, rng)))
        try:
            run = load_run(file, flags, 1, is_here=False)
        except ConfigError:
            continue
        DeepSpeedConfig(engine_config(run))
        num_taken += 1
    assert num_taken > 20
    faults_record("configuration: accepted, then DeepSpeed's", injected=num_taken, survived=num_taken)


def odd_files(folder: Path) -> dict[str, Path]:
    """Return what may be where a document is looked for, by what it is."""
    (folder / "text").write_text("{}", encoding="utf-8")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "large.json").write_bytes(b" " * (2**24 + 1))
    return {
        "a folder": folder,
        "nothing": folder / "missing.json",
        "below a file": folder / "text" / "x.json",
        "a symlink to itself": folder / "loop",
        "a symlink to nothing": folder / "dangling",
        "a name too long": folder / ("a" * 300),
        "a path too long": folder.joinpath(*["a" * 200] * 30),
        "a name with a zero byte": folder / "a\0b",
        "a name that is no text": folder / os.fsdecode(b"\xff.json"),
        "an empty name": Path(),
        "an empty file": Path("/dev/null"),
        "a file without an end": Path("/dev/zero"),
        "a file too large": folder / "large.json",
    }


def test_a_document_that_is_no_file_is_refused_in_one_line(tmp_path: Path, faults_record: FaultsRecord):
    files = odd_files(tmp_path)
    for name, path in files.items():
        begun = time.perf_counter()
        with pytest.raises(ConfigError) as refused:
            load_run(path, Overrides(output_dir=tmp_path / "out"), 1)
        assert str(refused.value).startswith(f"{path}: "), name
        assert "\n" not in str(refused.value)
        assert time.perf_counter() - begun < MOST_SECONDS, name
    faults_record("configuration: no such file", injected=len(files), survived=len(files))


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_command_line_is_a_run_or_one_line_on_standard_error_and_status_2(
    amount: int, tmp_path: Path, faults_record: FaultsRecord, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(24)
    parser = cli.train_parser("")
    flags = [
        action.option_strings[0] for action in parser._actions if action.dest not in ("help", "local_rank")
    ]
    places = [str(path) for path in odd_files(tmp_path).values() if "\0" not in str(path)]
    values = [value for value in JUNK if isinstance(value, str) and "\0" not in value and len(value) < 10_000]
    values.remove("\ud800")  # no process can be given it
    values += [
        *places,
        "0",
        "-1",
        "1",
        "3",
        "1e400",
        "nan",
        "-inf",
        "1e-3",
        "9" * 30,
        "2.5",
        "1_000",
        "v1",
        "gpu",
    ]
    values += ["--steps", "-", "--", "a/b", "a/b/c", "bundled:people", "linear", "sparse", "\u0661"]
    num_refused = 0
    for _ in range(4 * amount):
        line = ["--ds_config", str(rng.choice(DOCUMENTS))] if rng.random() < 0.7 else []
        for _ in range(rng.choice((1, 1, 2, 3))):
            flag = rng.choice(flags)
            line.append(rng.choice((flag, flag, flag, flag, flag[:-1], f"{flag}x", f"{flag}=")))
            line += [rng.choice(values)] if rng.random() < 0.9 else []
        num_refused += _is_refused(line, capsys)
    assert num_refused > amount
    faults_record("command line: flags and values", injected=4 * amount, survived=4 * amount)


def _is_refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    """Return whether ``train``, up to where the run is known, refuses a command line as it should."""

    def call(arguments: argparse.Namespace) -> None:
        assert_starts(load_run(arguments.ds_config, cli.overrides(arguments), 1, is_here=False))

    try:
        cli.main(call, cli.train_parser(""), line)
        status = 0
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr().err
    assert status in (0, 2), line
    if status == 2:
        assert said.startswith("error: "), said
        assert said.endswith("\n"), said
        assert said.count("\n") == 1, said
        assert len(said) < 1100, said
    return status == 2
