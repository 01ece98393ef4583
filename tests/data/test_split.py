"""Which records train and which validate; none does both unless it is asked to."""

import json
from pathlib import Path

import pytest

from sparse_llama.config.settings import DataSettings
from sparse_llama.data.ledger import Ledger
from sparse_llama.data.split import read_examples, split_indices
from sparse_llama.errors import ConfigError, DataError


def write(path: Path, *words: str) -> str:
    """Write one record a word; the word is its response."""
    lines = [json.dumps({"instruction": "Say it.", "response": word}) for word in words]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def read(dataset: str, **data: object) -> tuple[list[str], list[str], Ledger]:
    """Return the responses that train and those that validate."""
    ledger = Ledger(row_length=64, is_packed=True)
    settings = DataSettings.parse({"dataset": dataset} | data, "sparse_llama.data")
    training, held_out = read_examples(settings, ledger)
    return [one.response for one in training], [one.response for one in held_out], ledger


def test_dolly_is_split_as_the_report_split_it():
    """lit-llama's prepare_dolly.py at 15,011 lines; sum of the validation rows 14,733,984."""
    training, held_out = split_indices(15_011, 2000, 42)
    assert training[:8] == [13749, 1838, 13383, 1457, 13572, 8380, 6841, 3527]
    assert held_out[:8] == [5399, 12307, 5151, 1392, 3533, 12172, 1898, 6997]
    assert sum(held_out) == 14_733_984
    assert sorted(training + held_out) == list(range(15_011))


def test_the_report_s_split_is_over_the_order_of_the_file(tmp_path: Path):
    name = write(tmp_path / "dolly.jsonl", *map(str, range(15_011)))
    training, held_out, ledger = read(name, validation_records=2000)
    assert training[:4] == ["13749", "1838", "13383", "1457"]
    assert held_out[:4] == ["5399", "12307", "5151", "1392"]
    assert ledger.validation_source == "2,000 of 15,011 records, split off with seed 42"


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (19, 1), (40, 2), (60_000, 2000)])
def test_one_record_in_20_is_held_out_by_default_at_least_1_at_most_2000(tmp_path, count, held_out):
    training, validation, ledger = read(write(tmp_path / "a.jsonl", *map(str, range(count))))
    assert (len(training), len(validation)) == (count - held_out, held_out)
    assert not set(training) & set(validation)
    expected = f"{held_out:,} of {count:,} records, split off with seed 42, the default"
    assert ledger.validation_source == expected


def test_another_file_may_hold_the_validation_records(tmp_path: Path):
    name, other = write(tmp_path / "a.jsonl", "1", "2"), write(tmp_path / "b.jsonl", "3")
    training, held_out, ledger = read(name, validation=other)
    assert (training, held_out) == (["1", "2"], ["3"])
    assert (ledger.training_source, ledger.validation_source) == (name, other)


def test_a_split_of_the_data_set_s_own_is_used_and_other_wishes_are_said_to_have_no_effect(tmp_path: Path):
    write(tmp_path / "train.jsonl", *"abcdefgh")
    write(tmp_path / "validation.jsonl", "v")
    training, held_out, ledger = read(str(tmp_path), validation_records=3)
    assert (training, held_out) == (list("abcdefgh"), ["v"])
    assert ledger.validation_source == f"{tmp_path}, validation.jsonl"
    assert ledger.not_used == [
        "sparse_llama.data.validation_records: the data set brings validation records of its own"
    ]


def test_a_validation_set_that_is_named_goes_before_the_data_set_s_own(tmp_path: Path):
    write(tmp_path / "train.jsonl", "a")
    write(tmp_path / "validation.jsonl", "v")
    (tmp_path / "other").mkdir()
    _, held_out, ledger = read(str(tmp_path), validation=write(tmp_path / "other" / "b.jsonl", "w"))
    assert held_out == ["w"]
    assert ledger.not_used == [f"{tmp_path}, validation.jsonl"]


def test_records_beyond_the_limit_are_said_to_be_left_out(tmp_path: Path):
    training, held_out, ledger = read(write(tmp_path / "a.jsonl", *"abcdefgh"), max_records=3)
    assert (len(training), len(held_out)) == (3, 1)
    assert ledger.not_used == ["4 training records beyond sparse_llama.data.max_records"]


def test_the_last_twentieth_of_a_single_text_is_held_out_at_the_end_of_a_line(tmp_path: Path):
    lines = [f"line {number:02}\n" for number in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    training, held_out, ledger = read(str(tmp_path / "a.txt"))
    assert (training, held_out) == (["".join(lines[:95])], ["".join(lines[95:])])
    assert ledger.validation_source == "the last 5% of the text, the default"


def test_a_text_of_one_line_is_cut_at_a_space_and_one_word_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("word " * 40, encoding="utf-8")
    training, held_out, _ = read(str(tmp_path / "a.txt"))
    assert (training, held_out) == (["word " * 38], ["word " * 2])
    (tmp_path / "a.txt").write_text("word", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.txt: one text of 4 characters is too short .* name a valid"):
        read(str(tmp_path / "a.txt"))


def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path):
    name = write(tmp_path / "a.jsonl", *"abcde")
    with pytest.raises(DataError, match=r"validation_records: 5 of 5 records of .* leave none to train on"):
        read(name, validation_records=5)
    with pytest.raises(DataError, match=r"validation_records: 1 of 1 records of"):
        read(write(tmp_path / "one.jsonl", "a"))


def test_the_limit_of_malformed_records_counts_those_of_both_parts(tmp_path: Path):
    for part in ("train", "validation"):
        name = write(tmp_path / f"{part}.jsonl", "a")
        Path(name).write_text(f"{Path(name).read_text()}\n[]\n", encoding="utf-8")
    _, _, ledger = read(str(tmp_path), max_malformed=2)
    assert len(ledger.malformed) == 2
    with pytest.raises(
        DataError,
        match=r"train\.jsonl, line 2: must be an object, got list; that is the first of more than 1 "
        r"malformed records, the last is .*validation\.jsonl, line 2; repair the data, or raise "
        r"sparse_llama\.data\.max_malformed",
    ):
        read(str(tmp_path), max_malformed=1)


def test_splits_that_are_named_train_and_validate(tmp_path: Path):
    for name in ("train", "web", "dev"):
        write(tmp_path / f"{name}.jsonl", name)
    training, held_out, ledger = read(str(tmp_path), training_split="web", validation_split="train")
    assert (training, held_out) == (["web"], ["train"])
    assert ledger.not_used == ["dev.jsonl"]


def test_a_named_split_is_of_the_validation_set_where_there_is_one(tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    write(other / "hard.jsonl", "hard")
    write(other / "easy.jsonl", "easy")
    name = write(tmp_path / "a.jsonl", "1", "2")
    training, held_out, _ = read(name, validation=str(other), validation_split="hard")
    assert (training, held_out) == (["1", "2"], ["hard"])


def test_one_split_cannot_be_both(tmp_path: Path):
    with pytest.raises(ConfigError, match=r'training_split and validation_split are both "a"; name two'):
        read(str(tmp_path), training_split="a", validation_split="a")
