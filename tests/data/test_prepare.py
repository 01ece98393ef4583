"""From a name to batches: what is refused, and that the account adds up."""

import json
from pathlib import Path

import numpy
import pytest
import torch

from sparse_llama.config.bundled import resolve_bundled
from sparse_llama.config.settings import Settings
from sparse_llama.data.batches import Batch
from sparse_llama.data.ledger import Ledger, Tally, describe_lengths
from sparse_llama.data.prepare import PreparedData, prepare_data
from sparse_llama.data.tokenizer import Tokenizer, load_tokenizer
from sparse_llama.errors import DataError


def prepare(
    tokenizer: Tokenizer,
    *,
    seq_length: int = 160,
    align: int = 1,
    micro: int = 2,
    accumulation: int = 1,
    **data: object,
) -> PreparedData:
    settings = Settings.parse({"seq_length": seq_length, "data": data}, "sparse_llama")
    return prepare_data(
        settings,
        tokenizer,
        align=align,
        micro_batch_size=micro,
        accumulation=accumulation,
        rank=0,
        world_size=1,
    )


def write(path: Path, count: int, **extra: str) -> str:
    lines = [json.dumps({"instruction": f"Who {n}?", "response": f"Ann {n}."} | extra) for n in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("packing", "align", "micro"), [(True, 1, 1), (True, 16, 1), (False, 1, 2)])
def test_the_account_adds_up(tokenizer: Tokenizer, tmp_path: Path, packing: bool, align: int, micro: int):
    name = write(tmp_path / "a.jsonl", 60)
    data = prepare(
        tokenizer,
        dataset=name,
        packing=packing,
        align=align,
        micro=micro,
        validation_records=6,
        seq_length=300,
    )
    training, validation = data.ledger.training, data.ledger.validation
    assert (training.records, validation.records) == (54, 6)
    assert training.rows == data.batches.num_rows
    assert training.rows % micro == 0  # the first epoch is a whole number of batches
    epoch = [data.batches.step(step, 1)[0] for step in range(training.rows // micro)]
    for tally, batches in ((training, epoch), (validation, data.validation_batches)):
        in_rows = tally.tokens_labelled + tally.tokens_masked
        assert tally.tokens_read + tally.tokens_repeated == in_rows + tally.tokens_dropped
        assert sum(batch.input_ids.numel() for batch in batches) == in_rows + tally.tokens_padded
        assert sum(batch.num_labelled for batch in batches) == tally.tokens_labelled
        assert sum(count_ends(batch, tokenizer) for batch in batches) == tally.records


def count_ends(batch: Batch, tokenizer: Tokenizer) -> int:
    return int((batch.shift_labels == tokenizer.eos_id).sum())


def test_the_account_is_printed_and_saved(tokenizer: Tokenizer, tmp_path: Path):
    ledger = prepare(tokenizer, dataset=write(tmp_path / "a.jsonl", 60), max_records=50).ledger
    assert json.loads(json.dumps(ledger.to_json()))["training"]["records"] == 50
    lines = dict(ledger.rows())
    assert lines["not used"] == "7 training records beyond sparse_llama.data.max_records"
    assert lines["training"] == str(tmp_path / "a.jsonl")
    values = [value for label, value in ledger.rows() if label == "  tokens"]
    for value, tally in zip(values, (ledger.training, ledger.validation), strict=True):
        assert f"{tally.tokens_read:,} read; {tally.tokens_labelled:,} trained on" in value


def test_documents_of_packed_rows_start_at_multiples_of_the_block(tokenizer: Tokenizer, tmp_path: Path):
    data = prepare(tokenizer, dataset=write(tmp_path / "a.jsonl", 60), align=16, seq_length=300)
    starts = torch.cat([(batch.position_ids == 0).nonzero()[:, 1] for batch in data.validation_batches])
    assert len(starts) == 3
    assert max(starts) > 0
    assert (starts % 16 == 0).all()


def test_length_grouping_says_what_it_saves_and_leaves_the_validation_rows_the_same(
    tokenizer: Tokenizer, tmp_path: Path
):
    lines = [json.dumps({"instruction": "Who?", "response": "Ann " * (1 + n * 7 % 23)}) for n in range(46)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    drawn, grouped = (
        prepare(
            tokenizer,
            dataset=str(tmp_path / "a.jsonl"),
            packing=False,
            group_by_length=is_grouped,
            validation_records=6,
            accumulation=10,
        )
        for is_grouped in (False, True)
    )
    for name in ("training", "validation"):
        before, after = getattr(drawn.ledger, name), getattr(grouped.ledger, name)
        assert before.tokens_padding_saved == 0 < after.tokens_padding_saved
        assert after.tokens_padded + after.tokens_padding_saved == before.tokens_padded
    saved = grouped.ledger.training.tokens_padding_saved
    assert any(f"{saved:,} saved by length" in value for _, value in grouped.ledger.rows())
    labels = [
        sorted(
            int(batch.shift_labels[row].gt(-100).sum()) for batch in data.validation_batches for row in (0, 1)
        )
        for data in (drawn, grouped)
    ]
    assert labels[0] == labels[1]


def test_malformed_records_are_skipped_up_to_a_limit_and_shown(tokenizer: Tokenizer, tmp_path: Path):
    name = write(tmp_path / "a.jsonl", 20)
    with (tmp_path / "a.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n{\n[]\n")
    data = prepare(tokenizer, dataset=name, max_malformed=2)
    assert [line.removeprefix(name) for line in data.ledger.malformed] == [
        ", line 21: not JSON (Expecting property name enclosed in double quotes)",
        ", line 22: must be an object, got list",
    ]
    assert ("malformed, skipped", data.ledger.malformed[0]) in data.ledger.rows()
    with pytest.raises(DataError, match=r"line 21: not JSON .* more than 1 malformed records.*max_malformed"):
        prepare(tokenizer, dataset=name, max_malformed=1)


def test_what_leaves_nothing_to_train_on_is_refused(tokenizer: Tokenizer, tmp_path: Path):
    name = write(tmp_path / "a.jsonl", 5)
    with pytest.raises(DataError, match=r"no training record leaves room .* in 8 tokens; use a longer"):
        prepare(tokenizer, dataset=name, seq_length=8)
    with pytest.raises(DataError, match=r"empty\.jsonl: no records"):
        prepare(tokenizer, dataset=write(tmp_path / "empty.jsonl", 0))


def test_prompts_too_long_to_answer_are_not_asked(tokenizer: Tokenizer, tmp_path: Path):
    name, long = write(tmp_path / "a.jsonl", 8), write(tmp_path / "b.jsonl", 2, context="word " * 200)
    Path(long).write_text(Path(long).read_text() + "\n" + Path(name).read_text(), encoding="utf-8")
    data = prepare(tokenizer, dataset=name, validation=long)
    assert data.ledger.validation.dropped == 2
    assert len(data.validation_examples) == 8


def test_the_bundled_records_come_with_their_own_validation():
    folder = resolve_bundled("bundled:tiny-llama")
    assert folder is not None
    data = prepare(load_tokenizer(folder), dataset="bundled:people", seq_length=512, align=16)
    assert data.ledger.training_source == "bundled:people, train.jsonl"
    assert data.ledger.validation_source == "bundled:people, validation.jsonl"
    assert data.ledger.training.records >= 2000
    assert data.ledger.training.dropped == data.ledger.training.truncated == 0
    assert len({example.category for example in data.validation_examples}) >= 3


@pytest.mark.real_data
def test_a_text_file_becomes_rows_of_its_own_tokens(shared: Path):
    folder = shared / "models" / "stories260K"
    text = shared / "data" / "tinystories-sample.txt"
    tokenizer = load_tokenizer(folder)
    data = prepare(tokenizer, dataset=str(text), validation=str(text), seq_length=512)
    assert data.ledger.training.tokens_read == len(tokenizer.encode(text.read_text(encoding="utf-8"))) + 2
    assert data.ledger.training.tokens_labelled == data.ledger.training.tokens_read - 1


@pytest.mark.real_data
def test_an_eighth_of_a_megabyte_of_dolly_fills_its_rows(shared: Path):
    """Best fit of real lengths: less than a tenth of the tokens of a row of 1,024 is padding."""
    tokenizer = load_tokenizer(shared / "models" / "stories260K")
    data = prepare(tokenizer, dataset=str(shared / "data" / "dolly-sample.jsonl"), seq_length=1024)
    tally = data.ledger.training
    assert tally.tokens_padded < 0.1 * tally.rows * 1024


def test_percentiles_are_the_least_lengths_that_their_shares_do_not_exceed():
    """numpy calls it the inverted CDF."""
    for count in (1, 2, 7, 100, 101, 1000):
        lengths = torch.randint(1, 900, (count,), generator=torch.Generator().manual_seed(count))
        shares = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
        assert describe_lengths(lengths) == {
            name: numpy.percentile(lengths.numpy(), share, method="inverted_cdf")
            for name, share in shares.items()
        }


def test_many_categories_are_shortened_in_the_table_and_whole_in_the_account(
    tokenizer: Tokenizer, tmp_path: Path
):
    lines = [
        json.dumps({"instruction": "Who?", "response": "Ann.", "category": f"kind {n % 10}"})
        for n in range(45)
    ]
    name, other = write(tmp_path / "b.jsonl", 2), str(tmp_path / "a.jsonl")
    Path(other).write_text("\n".join(lines), encoding="utf-8")
    ledger = prepare(tokenizer, dataset=other, validation=name, seq_length=300).ledger
    assert ledger.training.categories == {f"kind {n}": 5 - n // 5 for n in range(10)}
    assert ledger.validation.categories == {}
    (line,) = [value for label, value in ledger.rows() if label == "  categories"]
    assert line.startswith("kind 0 5, kind 1 5,")
    assert line.endswith("kind 7 4 and 2 more")


@pytest.mark.parametrize(("count", "is_said"), [(20, False), (21, True)])
def test_more_than_one_record_in_20_that_loses_something_is_a_warning(count: int, is_said: bool):
    ledger = Ledger(row_length=64, is_packed=True)
    ledger.validation = Tally(records=400, truncated=count - 5, dropped=5)
    expected = (
        "21 of 400 validation records (5%) are longer than 64 tokens: 16 lose their ends, 5 are dropped; "
        "use a longer sparse_llama.seq_length"
    )
    assert ledger.warnings() == ([expected] if is_said else [])
