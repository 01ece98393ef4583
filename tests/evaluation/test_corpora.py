"""What is measured on: names, files, joins, and what cannot be had."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from sparse_llama.data.prompt import alpaca_prompt
from sparse_llama.errors import DataError
from sparse_llama.evaluation.corpora import pages_of, read_corpus

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_lines(path: Path, records: list[Any]) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Let ``load_dataset`` give 1,200 rows of a commit and note what it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: str, **options: Any) -> datasets.Dataset:
        asked.append((*arguments, options))
        rows = [f"row {number}" for number in range(1200)]
        files = {f"hf://datasets/some/one@{COMMIT}/test.parquet": {"num_bytes": 1, "checksum": None}}
        info = datasets.DatasetInfo(download_checksums=files)
        return datasets.Dataset.from_dict({"text": rows, "sentence": rows}, info=info)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_wikitext2_is_the_raw_test_split_joined_by_blank_lines(hub):
    corpus = read_corpus("wikitext2")
    ((data_set, configuration, options),) = hub
    assert (data_set, configuration, options["split"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert f"wikitext-2-raw-v1, revision {options['revision']}, test, 1,200 rows" in corpus.source
    text = corpus.text
    assert text is not None
    assert text.startswith("row 0\n\nrow 1\n\n")
    assert text.endswith("\n\nrow 1199")


def test_ptb_is_the_hubs_parquet_of_the_test_split_joined_by_spaces(hub):
    corpus = read_corpus("ptb")
    text = corpus.text
    assert f"revision {COMMIT}, test, 1,200 rows" in corpus.source
    ((builder, options),) = hub
    assert (builder, options["split"]) == ("parquet", "test")
    assert options["data_files"]["test"].startswith("hf://datasets/ptb-text-only/ptb_text_only@")
    assert text is not None
    assert text.startswith("row 0 row 1 ")
    assert text.endswith(" row 1199")
    assert corpus.documents == (text,)


def test_c4_is_the_first_1100_documents_of_the_first_validation_file(hub):
    corpus = read_corpus("c4")
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    ((data_set, options),) = hub
    assert (data_set, options["split"], options["data_files"]) == ("allenai/c4", "validation", files)
    assert f"revision {options['revision']}" in corpus.source
    assert corpus.documents == tuple(f"row {number}" for number in range(1100))
    assert corpus.text is not None
    assert corpus.text.endswith(" row 1099")
    assert "1,100 rows joined by ' '" in corpus.source


def test_a_page_of_wikitext_begins_at_a_title_and_not_at_the_headings_within_it():
    rows = ["", " = One = \n", "", " A text . \n", " = = Part = = \n", " = Two = \n", " = = = Deep = = = \n"]
    assert pages_of(rows) == [
        " = One = \n \n A text . \n = = Part = = ",
        " = Two = \n = = = Deep = = = ",
    ]


@pytest.mark.real_data
def test_wikitext2_has_the_62_pages_that_lm_eval_counts(shared: Path):
    """``EleutherAI/wikitext_document_level``, of 62 rows in this split, is made from the same lines."""
    text = (shared / "data" / "wikitext-2-test.txt").read_text(encoding="utf-8")
    assert len(pages_of(text.splitlines())) == 62


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_without_a_network_one_line_says_to_give_a_file(name):
    with pytest.raises(
        DataError, match=rf"--data {name}: not available from the hub .* --data FILE.txt$"
    ) as caught:
        read_corpus(name)
    assert "\n" not in str(caught.value)


def test_a_text_file_is_measured_to_the_last_byte(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("  two\r\nlines, \u00e9 \n\n".encode())
    corpus = read_corpus(str(path))
    assert corpus.text == "  two\r\nlines, \u00e9 \n\n"
    assert corpus.examples == ()


def test_documents_are_joined_by_blank_lines_and_counted(tmp_path):
    name = write_lines(tmp_path / "texts.jsonl", [{"text": "one"}, {"text": "two\n"}, {"text": "three"}])
    corpus = read_corpus(name)
    assert corpus.text == "one\n\ntwo\n\n\nthree"
    assert corpus.documents == ("one", "two\n", "three")
    assert "3 documents" in corpus.source


def test_records_stay_records(tmp_path):
    record = {"instruction": "Who?", "context": "Ann.", "response": "Ann is.", "category": "qa"}
    (example,) = read_corpus(write_lines(tmp_path / "records.jsonl", [record])).examples
    assert (example.prompt, example.response) == (alpaca_prompt("Who?", "Ann."), "Ann is.")
    assert example.category == "qa"


def test_a_data_set_with_a_validation_split_is_measured_on_that():
    corpus = read_corpus("bundled:people")
    assert corpus.text is None
    assert len(corpus.examples) == 180  # sparse_llama/demo/dataset.py: 60 in each of three categories
    assert "validation" in corpus.source


def test_malformed_records_are_skipped_and_told(tmp_path):
    name = write_lines(tmp_path / "records.jsonl", [{"text": "one"}, "{", {"text": "two"}, {"text": 3}])
    corpus = read_corpus(name)
    assert corpus.text == "one\n\ntwo"
    assert len(corpus.malformed) == 2
    assert "line 2: not JSON" in corpus.malformed[0]
    assert "line 4: text: must be a string, got int" in corpus.malformed[1]


def test_too_many_malformed_records_are_refused(tmp_path):
    name = write_lines(tmp_path / "records.jsonl", [{"text": "one"}, *["{"] * 11])
    with pytest.raises(
        DataError, match=r"line 2: not JSON .* more than 10 malformed records, the last is .* line 12"
    ):
        read_corpus(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikitext", r"no file and no corpus is called 'wikitext'; did you mean 'wikitext2'\?"),
        ("missing", r"no file and no corpus is called 'missing'; allowed: wikitext2, ptb, c4"),
        ("missing.txt", "missing.txt: no such file or folder"),
        ("some/where/missing.jsonl", "missing.jsonl: no such file or folder"),
    ],
)
def test_what_does_not_exist_is_refused(name, message):
    with pytest.raises(DataError, match=message):
        read_corpus(name)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no records"):
        read_corpus(str(tmp_path / "empty.txt"))


@pytest.mark.real_data
def test_real_files_are_what_they_hold(shared: Path):
    data = shared / "data"
    c4 = read_corpus(str(data / "c4-sample.jsonl"))
    assert c4.text is not None
    assert "300 documents" in c4.source
    assert len(read_corpus(str(data / "dolly-sample.jsonl")).examples) == 151
    alpaca = json.loads((data / "alpaca-sample.json").read_text(encoding="utf-8"))
    assert len(read_corpus(str(data / "alpaca-sample.json")).examples) == len(alpaca)
    wikitext = read_corpus(str(data / "wikitext-2-test.txt"))
    assert wikitext.text is not None
    assert len(wikitext.text.encode()) == 1_256_449
