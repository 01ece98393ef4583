"""Files of every kind hold the same records; what cannot be read is said in one line."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from sparse_llama.data.files import Found, read_file
from sparse_llama.data.sources import open_source
from sparse_llama.errors import DataError

RECORDS = [
    {"instruction": f'Say "{n}",\nplease', "context": "", "response": f"{n} \U0001f642"} for n in range(5)
]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(RECORDS), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(RECORDS[0]))
            writer.writeheader()
            writer.writerows(RECORDS)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, kind: str):
    examples = [found.example for found in read_file(write(tmp_path, kind))]
    assert [example.response for example in examples if example] == [r["response"] for r in RECORDS]
    assert all(example and RECORDS[i]["instruction"] in example.prompt for i, example in enumerate(examples))


def test_a_text_file_is_one_document(tmp_path: Path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n", encoding="utf-8")
    (found,) = read_file(tmp_path / "a.txt")
    assert found.example is not None
    assert (found.example.prompt, found.example.response) == ("", "One.\n\nTwo.\n")


def complaints(path: Path) -> list[str]:
    """Return place and reason of each malformed record, without the path."""
    found = read_file(path)
    return [f"{one.place}: {one.reason}".removeprefix(str(path)) for one in found if one.example is None]


def test_malformed_lines_are_named_and_the_others_kept(tmp_path: Path):
    good = json.dumps(RECORDS[0]).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([good, b"{oops", b"", b'{"text": "\xff"}', b"[1]", good]))
    assert [one.example is not None for one in read_file(path)] == [True, False, False, False, True]
    assert complaints(path) == [
        ", line 2: not JSON (Expecting property name enclosed in double quotes)",
        ", line 4: not UTF-8 text (byte 11 of the line)",
        ", line 5: must be an object, got list",
    ]


def test_a_malformed_record_of_a_json_list_is_named_by_the_line_it_begins_on(tmp_path: Path):
    path = tmp_path / "data.json"
    path.write_text(
        '\n[\n {"text":\n "one"},\n\n {"text": 2},\n [],\n {"text": "three"}\n]\n', encoding="utf-8"
    )
    assert [one.example.response for one in read_file(path) if one.example] == ["one", "three"]
    assert complaints(path) == [
        ", line 6: text: must be a string, got int",
        ", line 7: must be an object, got list",
    ]


@pytest.mark.parametrize("text", ["[]", " [ ] \n", "[1]", '[{"a": [1, "]"]}, 2 ,\n3]', "\ufeff[1, 2]"])
def test_a_json_list_has_the_elements_that_python_s_own_reader_finds(tmp_path: Path, text: str):
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    assert len(list(read_file(path))) == len(json.loads(text.removeprefix("\ufeff")))


def test_a_malformed_csv_record_is_named_by_its_first_line(tmp_path: Path):
    path = tmp_path / "data.csv"
    path.write_bytes(b'instruction,response\n"Hi\nthere",Hello\n\nHi,\xff\nHi,Hello,more\nHi\n"Hi\nthere",\n')
    assert [one.example.response for one in read_file(path) if one.example] == ["Hello"]
    assert complaints(path) == [
        ", line 5: response: not UTF-8 text",
        ", line 6: has 3 fields, the header 2",
        ", line 7: has 1 fields, the header 2",
        ", line 8: response: empty",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            b'{"a": 1}',
            r"not a JSON list of records \(Expecting '\[': line 1 column 1 .* is \.jsonl",
        ),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "Expecting ',': line 2 column 1"),
        ("a.json", b"[1, ]", "Expecting value: line 1 column 5"),
        ("a.json", b"[", "Expecting value: line 1 column 2"),
        ("a.json", b"[1] 2", "Extra data: line 1 column 5"),
        ("a.txt", b"one\n\xff", "line 2: not UTF-8 text"),
        ("a.csv", b'text\none\n"two\nthree', "line 3: not CSV"),
        ("a.parquet", b"PAR1", "not a complete Parquet file"),
        ("a.xlsx", b"", r"cannot be read as data; expected \.csv, \.json, \.jsonl, \.parquet, \.txt"),
    ],
)
def test_a_file_that_is_damaged_as_a_whole_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(open_source(str(tmp_path / name)).training)


def responses(records: Iterator[Found] | None) -> list[str]:
    return [] if records is None else [one.example.response for one in records if one.example]


@pytest.mark.parametrize(
    ("names", "training", "validation", "not_used"),
    [
        (["part-1", "part-2", "validation"], ["part-1", "part-2"], ["validation"], []),
        (["train-00000-of-00002", "train-00001-of-00002"], None, [], []),
        (["train", "valid", "test", "extra"], ["train"], ["valid"], ["extra", "test"]),
        (["train", "test"], ["train"], ["test"], []),
        (["one", "test"], ["one"], ["test"], []),
        (["dev_set", "training"], ["training"], ["dev_set"], []),
    ],
)
def test_a_folder_tells_training_from_validation_by_name(
    tmp_path: Path, names, training, validation, not_used
):
    """A test file never trains."""
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}), encoding="utf-8")
    (tmp_path / "notes.md").write_text("no data", encoding="utf-8")
    source = open_source(str(tmp_path))
    assert responses(source.training) == (training or names)
    assert responses(source.validation) == validation
    assert (source.validation is None) == (validation == [])
    assert source.not_used == tuple(f"{name}.jsonl" for name in not_used)


def test_a_folder_without_training_files_is_refused(tmp_path: Path):
    (tmp_path / "validation.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"no training file; expected train\.jsonl"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["no/such/file.jsonl", "./nothing", "missing.csv"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str):
    with pytest.raises(DataError, match="no such file or folder; give a file, a folder, or a hub id"):
        open_source(name)


def test_an_unreachable_hub_is_one_line_with_the_name():
    with pytest.raises(
        DataError, match=r"no-such-owner/no-such-data: no such file, and not available from the hub"
    ):
        open_source("no-such-owner/no-such-data")


@pytest.mark.parametrize(
    ("splits", "training", "validation", "not_used"),
    [
        (["train", "validation", "test"], "train", ["validation"], ["test"]),
        (["train", "test"], "train", ["test"], []),
        (["train"], "train", [], []),
        (["test"], "test", [], []),
    ],
)
def test_a_hub_data_set_tells_training_from_validation_by_its_splits(
    monkeypatch, splits: list[str], training: str, validation: list[str], not_used: list[str]
):
    rows = {split: datasets.Dataset.from_list([{"text": split}, {"text": ""}]) for split in splits}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(rows))
    source = open_source("owner/name")
    found = list(source.training)
    assert [one.example.response for one in found if one.example] == [training]
    assert (found[1].place, found[1].reason) == ("owner/name, record 1", "text: empty")
    assert responses(source.validation) == validation
    assert source.training_name == f"owner/name, {training}"
    assert source.not_used == tuple(f"owner/name, {split}" for split in not_used)


def test_hub_splits_of_which_none_is_called_train_are_refused(monkeypatch):
    rows = {split: datasets.Dataset.from_list([{"text": split}]) for split in ("train_sft", "train_gen")}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(rows))
    with pytest.raises(DataError, match="its splits are train_sft, train_gen; none is called train"):
        open_source("owner/name")


def test_a_data_set_that_is_a_script_is_refused_in_one_line(monkeypatch):
    def refuse(name: str) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found name.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"owner/name: .* scripts are no longer supported") as caught:
        open_source("owner/name")
    assert "\n" not in str(caught.value)


def write_folder(folder: Path, *names: str) -> str:
    for name in names:
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("asked", "training", "validation", "not_used"),
    [
        ({"training_split": "books"}, ["books"], ["test"], ["news", "train"]),
        ({"validation_split": "news"}, ["train"], ["news"], ["books", "test"]),
        ({"training_split": "news", "validation_split": "books"}, ["news"], ["books"], ["test", "train"]),
        ({"training_split": "test"}, ["test"], [], ["books", "news", "train"]),
        ({"training_split": "books.jsonl"}, ["books"], ["test"], ["news", "train"]),
    ],
)
def test_files_of_a_folder_can_be_named_whatever_they_are_called(
    tmp_path: Path, asked, training, validation, not_used
):
    source = open_source(write_folder(tmp_path, "train", "test", "news", "books"), **asked)
    assert (responses(source.training), responses(source.validation)) == (training, validation)
    assert source.not_used == tuple(f"{name}.jsonl" for name in not_used)


def test_a_name_stands_for_all_its_shards(tmp_path: Path):
    shards = [f"web-0000{number}-of-00002" for number in range(2)]
    source = open_source(write_folder(tmp_path, *shards, "train"), training_split="web")
    assert responses(source.training) == shards


def test_a_wrong_name_is_answered_with_the_names_there_are(tmp_path: Path, monkeypatch):
    name = write_folder(tmp_path, "train", "web-00000-of-00001")
    with pytest.raises(
        DataError, match=r"^sparse_llama\.data\.training_split: .* has no split \"wep\"; there is train, web$"
    ):
        open_source(name, training_split="wep")
    with pytest.raises(DataError, match=r'validation_split: .*train\.jsonl has no split "x"; there is none'):
        open_source(f"{name}/train.jsonl", validation_split="x")
    rows = {split: datasets.Dataset.from_list([{"text": split}]) for split in ("train_sft", "test_sft")}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(rows))
    with pytest.raises(
        DataError, match=r'training_split: owner/name has no split "train"; there is train_sft'
    ):
        open_source("owner/name", training_split="train")


def test_splits_of_the_hub_can_be_named(monkeypatch):
    rows = {split: datasets.Dataset.from_list([{"text": split}]) for split in ("train_sft", "a", "test_sft")}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(rows))
    source = open_source("owner/name", training_split="train_sft", validation_split="a")
    assert (responses(source.training), responses(source.validation)) == (["train_sft"], ["a"])
    assert source.not_used == ("owner/name, test_sft",)
    source = open_source("owner/name", training_split="train_sft")
    assert responses(source.validation) == ["test_sft"]
