"""Rows from the cache are the rows that a tokenizer makes, and whatever is wrong with it costs time only."""

import io
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import run_ranks
from rich.console import Console

from sparse_llama.config.settings import DataSettings, Settings
from sparse_llama.data.cache import open_cache, rows_key
from sparse_llama.data.prepare import PreparedData, prepare_data
from sparse_llama.data.records import plain_text
from sparse_llama.data.tokenizer import SentencePieceTokenizer, load_tokenizer


class CountingTokenizer(SentencePieceTokenizer):
    """Counts what it is asked."""

    num_calls = 0

    def encode(self, text: str) -> list[int]:
        self.num_calls += 1
        return super().encode(text)


Start = Callable[..., tuple[PreparedData, int, str]]


@pytest.fixture
def start(tokenizer_folder: Path, tmp_path: Path) -> Start:
    """Return a function that prepares data as the start of a run does: what it made, how many texts it
    tokenised, and what it said."""
    lines = [json.dumps({"instruction": f"Who {n}?", "response": "Ann " * (n % 7 + 1)}) for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def prepare(*, align: int = 16, **block: Any) -> tuple[PreparedData, int, str]:
        data = {"dataset": str(tmp_path / "a.jsonl"), "cache_dir": str(tmp_path / "cache")}
        block["data"] = data | block.get("data", {})
        settings = Settings.parse({"seq_length": 300} | block, "sparse_llama")
        tokenizer = CountingTokenizer(tokenizer_folder / "tokenizer.model")
        said = io.StringIO()
        made = prepare_data(
            settings,
            tokenizer,
            align=align,
            micro_batch_size=2,
            rank=0,
            world_size=1,
            console=Console(file=said, width=400),
        )
        return made, tokenizer.num_calls, said.getvalue()

    return prepare


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "rows").iterdir())


def assert_same(one: PreparedData, other: PreparedData) -> None:
    """Compare everything that a run gets to see."""
    assert one.ledger == other.ledger
    assert one.validation_examples == other.validation_examples
    assert one.batches.num_rows == other.batches.num_rows
    steps = range(-(-one.batches.num_rows // 2))
    pairs = [(one.batches.step(step, 1)[0], other.batches.step(step, 1)[0]) for step in steps]
    pairs += zip(one.validation_batches, other.validation_batches, strict=True)
    for mine, its in pairs:
        for name in ("input_ids", "position_ids", "shift_labels"):
            assert torch.equal(getattr(mine, name), getattr(its, name)), name


@pytest.mark.parametrize("packing", [True, False])
def test_the_second_start_tokenises_nothing_and_has_the_same_rows(start: Start, packing: bool):
    """The account of the tokens included."""
    never, calls, _ = start(data={"cache": False, "packing": packing})
    assert calls > 60
    first, calls, _ = start(data={"packing": packing})
    assert calls > 60
    second, calls, said = start(data={"packing": packing})
    assert calls == 0
    assert said == ""
    assert_same(first, never)
    assert_same(second, never)


def test_nothing_is_written_where_the_cache_is_off(start: Start, tmp_path: Path):
    start(data={"cache": False})
    assert not (tmp_path / "cache").exists()


def test_rows_are_mapped_from_their_file(start: Start, tmp_path: Path):
    """As the kernel sees it."""
    start()
    kept, _, _ = start()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert kept.batches.num_rows > 0
    assert any(f"{entry}/rows.safetensors" in maps for entry in entries(tmp_path))  # validation is in batches


@pytest.mark.parametrize(
    "change",
    [
        {"seq_length": 299},
        {"seed": 7},
        {"align": 8},
        {"data": {"packing": False}},
        {"data": {"max_records": 50}},
        {"data": {"split_seed": 7}},
    ],
    ids=str,
)
def test_whatever_changes_the_rows_makes_others(start: Start, change: dict[str, Any]):
    start()
    changed, calls, _ = start(**change)
    assert calls > 0
    anew, _, _ = start(**change | {"data": change.get("data", {}) | {"cache": False}})
    assert_same(changed, anew)


@pytest.mark.parametrize("change", [{"seed": 7}, {"align": 8}], ids=str)
def test_rows_that_are_not_packed_depend_on_neither_seed_nor_block(start: Start, change: dict[str, Any]):
    start(data={"packing": False})
    assert start(**change, data={"packing": False})[1] == 0


def test_records_are_told_apart_by_what_they_say_not_by_when_they_were_written(start: Start, tmp_path: Path):
    start()
    path = tmp_path / "a.jsonl"
    os.utime(path, (1, 1))
    assert start()[1] == 0
    before = path.stat()
    path.write_text(path.read_text(encoding="utf-8").replace("Ann Ann", "Bob Ann", 1), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert start()[1] > 0


def test_another_tokenizer_is_another_entry_also_under_the_same_name(tokenizer_folder: Path, tmp_path: Path):
    settings, examples = Settings(), [plain_text("Ann")]
    content = (tokenizer_folder / "tokenizer.model").read_bytes()
    keys = []
    for folder, what in (("one", content), ("same", content), ("other", content + b"\x1a\x00")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.model").write_bytes(what)
        keys.append(rows_key(examples, load_tokenizer(tmp_path / folder), settings, 1))
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("cut", ["rows", "byte", "manifest", "half", "gone"])
def test_a_damaged_entry_is_noticed_said_and_made_anew(start: Start, tmp_path: Path, cut: str):
    whole, _, _ = start(data={"cache": False})  # what is mapped from a file changes with it
    start()
    for entry in entries(tmp_path):
        rows, manifest = entry / "rows.safetensors", entry / "manifest.json"
        content = rows.read_bytes()
        if cut == "rows":
            rows.write_bytes(content[:-4])
        elif cut == "byte":  # somewhere in the tokens
            rows.write_bytes(content[:-400] + bytes([content[-400] ^ 1]) + content[-399:])
        elif cut == "manifest":
            manifest.write_text("{}", encoding="utf-8")
        elif cut == "half":
            manifest.write_text(manifest.read_text(encoding="utf-8")[:40], encoding="utf-8")
        else:
            rows.unlink()
    again, calls, said = start()
    assert calls > 60
    assert said.count("damaged (") == 2
    assert said.count("tokenising again") == 2
    assert_same(again, whole)
    kept, calls, said = start()
    assert (calls, said) == (0, "")
    assert_same(kept, whole)


def test_a_folder_that_cannot_be_written_is_said_once_and_the_run_goes_on(start: Start, tmp_path: Path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    made, calls, said = start(data={"cache_dir": str(tmp_path / "file")})
    assert calls > 60
    assert said.count("rows cannot be kept there (Not a directory)") == 1
    assert "sparse_llama.data.cache_dir" in said
    assert made.batches.num_rows > 0


def test_a_full_disk_leaves_nothing_half_written(start: Start, tmp_path: Path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("sparse_llama.data.cache.save_file", fail)
    _, calls, said = start()
    assert calls > 60
    assert said.count("No space left on device") == 1
    assert entries(tmp_path) == []


def _build(folder: str, tokenizer: Path, dataset: str, together: Any, results: Any) -> None:
    settings = Settings.parse({"data": {"dataset": dataset, "cache_dir": folder}}, "sparse_llama")
    together.wait()
    made = prepare_data(
        settings, load_tokenizer(tokenizer), align=1, micro_batch_size=1, rank=0, world_size=1
    )
    results.put(made.batches.num_rows)


def test_two_jobs_that_build_one_entry_at_once_leave_one_that_is_whole(
    start: Start, tmp_path: Path, tokenizer_folder: Path
):
    context = multiprocessing.get_context("fork")
    together, results = context.Barrier(3), context.Queue()
    arguments = (str(tmp_path / "cache"), tokenizer_folder, str(tmp_path / "a.jsonl"), together, results)
    jobs = [context.Process(target=_build, args=arguments) for _ in range(3)]
    for job in jobs:
        job.start()
    counts = {results.get(timeout=60) for _ in jobs}
    for job in jobs:
        job.join(timeout=60)
    assert len(counts) == 1
    assert [sorted(path.name for path in entry.iterdir()) for entry in entries(tmp_path)] == [
        ["manifest.json", "rows.safetensors"]
    ] * 2
    _, calls, said = start(align=1, seq_length=512)
    assert (calls, said) == (0, "")


def test_of_two_ranks_one_tokenises_and_the_other_reads_its_own_rows(
    start: Start, tmp_path: Path, tokenizer_folder: Path
):
    model, dataset = tokenizer_folder / "tokenizer.model", tmp_path / "a.jsonl"
    arguments = (str(model), str(dataset), str(tmp_path / "cache"))
    main, other = run_ranks(Path(__file__).with_name("cache_ranks.py"), 2, *arguments, timeout_s=120)
    assert main["calls"] > 60
    assert other["calls"] == 0
    alone, _, _ = start(data={"cache": False, "cache_dir": None}, align=1, seq_length=512)
    assert main["tokens"] == other["tokens"] == alone.ledger.training.tokens_read
    assert sorted(main["rows"] + other["rows"]) == sorted(
        row.sum().item() for step in (0, 1) for row in alone.batches.step(step, 1)[0].input_ids
    )


def test_the_cache_is_where_the_setting_the_environment_or_the_desktop_says(monkeypatch, tmp_path: Path):
    def folder(**data: Any) -> str:
        cache = open_cache(DataSettings.parse(data, "data"), Console(quiet=True))
        assert cache is not None
        return str(cache.folder)

    monkeypatch.setenv("SPARSE_LLAMA_CACHE", "/named")
    monkeypatch.setenv("XDG_CACHE_HOME", "/desktop")
    monkeypatch.setenv("HOME", "/home/ann")
    assert folder(cache_dir="~/mine") == "/home/ann/mine/rows"
    assert folder() == "/named/rows"
    monkeypatch.delenv("SPARSE_LLAMA_CACHE")
    assert folder() == "/desktop/sparse-llama/rows"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == "/home/ann/.cache/sparse-llama/rows"
