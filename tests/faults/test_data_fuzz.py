"""Data that are damaged, of another kind or hostile: every record is used, or told of with its place, or the
run is refused in one line."""

import csv
import functools
import gzip
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import json_mutations
import pyarrow
import pyarrow.parquet
import pytest
from fault_table import FaultsRecord
from json_mutations import JUNK, flipped
from rich.console import Console

from sparse_llama.config.bundled import MODELS
from sparse_llama.config.settings import Settings
from sparse_llama.data.prepare import PreparedData, prepare_data
from sparse_llama.data.tokenizer import load_tokenizer
from sparse_llama.errors import DataError, SparseLlamaError
from sparse_llama.reporting.tables import show_table

AMOUNTS = [pytest.param(10, id="few"), pytest.param(1500, id="many", marks=pytest.mark.faults)]
MOST_CHARACTERS = 800  # of a line without the file's path
DOLLY = [
    {"instruction": f"Who is {n}?", "context": "", "response": f"Ann {n}.", "category": "qa"}
    for n in range(12)
]
CHAT = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Hi {n}"},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    for n in range(8)
]
TEXTS = [{"text": f"some text {n} and more"} for n in range(12)]
GOOD = json.dumps(DOLLY[0])


def prepare(file: Path, **data: Any) -> PreparedData:
    """Return what a run of ``file`` would train on."""
    block = {"dataset": str(file), "cache": False} | data
    settings = Settings.parse({"seq_length": 256, "data": block}, "sparse_llama")
    tokenizer = _tokenizer()
    return prepare_data(settings, tokenizer, align=1, micro_batch_size=2, rank=0, world_size=1)


@functools.cache
def _tokenizer() -> Any:
    return load_tokenizer(MODELS["bundled:tiny-llama"])


def refusal(file: Path, **data: Any) -> str:
    """Return the line that refuses ``file``, in which its path is a star."""
    with pytest.raises(SparseLlamaError) as refused:
        prepare(file, **data)
    return checked_line(str(refused.value), file)


def checked_line(line: str, file: Path) -> str:
    said = line.replace(str(file), "*")
    assert "*" in said, line
    assert said.isprintable(), said
    assert len(said) < MOST_CHARACTERS, said
    return said


def num_records(kind: str, content: bytes) -> int:
    """Return how many records there are in a file that is whole, counted by other means than ours."""
    if kind == "jsonl":
        return sum(bool(line.strip()) for line in content.split(b"\n"))
    if kind == "json":
        return len(json.loads(content))
    if kind == "csv":
        return sum(bool(row) for row in csv.reader(io.StringIO(content.decode(), newline=""))) - 1
    return pyarrow.parquet.read_metadata(io.BytesIO(content)).num_rows


def written(kind: str, records: list[Any]) -> bytes:
    """Return the content of a file of ``records``; tables have those that are objects."""
    if kind == "jsonl":
        return "\n".join(json.dumps(record) for record in records).encode()
    if kind == "json":
        return json.dumps(records, indent=1).encode()
    rows = [record for record in records if isinstance(record, dict)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if kind == "csv":
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerows([columns, *([row.get(key, "") for key in columns] for row in rows)])
        return file.getvalue().encode("utf-8", "replace")
    saved = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), saved)
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):  # columns of several types, say
        return written(kind, DOLLY)
    return saved.getvalue()


def changed_records(rng: random.Random) -> list[Any]:
    """Return records of one schema or two with a few of them changed."""
    records = json.loads(json.dumps(rng.choice((DOLLY, CHAT, TEXTS, DOLLY + TEXTS))))
    for _ in range(rng.choice((1, 2, 6))):
        place = rng.randrange(len(records))
        if rng.random() < 0.15:
            records[place] = rng.choice(JUNK)
        elif isinstance(records[place], dict) and records[place]:
            rng.choice(json_mutations.CHANGES)(records[place], rng)
    return records


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_record_is_used_or_told_of_whatever_is_in_it(
    kind: str, amount: int, tmp_path: Path, faults_record: FaultsRecord
):
    rng, file = random.Random(30), tmp_path / f"data.{kind}"
    num_prepared = 0
    for _ in range(amount):
        content = written(kind, changed_records(rng))
        file.write_bytes(content)
        limit = rng.choice((0, 3, 1000))
        try:
            data = prepare(file, max_malformed=limit)
        except DataError as error:
            checked_line(str(error), file)
            continue
        num_prepared += 1
        assert_accounted(data, file, num_records(kind, content))
    assert 0 < num_prepared < amount
    faults_record(f"data: records of .{kind}", injected=amount, survived=amount)


def assert_accounted(data: PreparedData, file: Path, total: int) -> None:
    ledger = data.ledger
    assert ledger.training.records + ledger.validation.records + len(ledger.malformed) == total
    for line in ledger.malformed:
        checked_line(line, file)
    shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    show_table("data", ledger.rows(), Console(file=shown))
    shown.flush()  # what cannot be printed would show here
    json.dumps(ledger.to_json(), allow_nan=False)


def spoiled(content: bytes, rng: random.Random) -> bytes:
    """Return ``content`` after something has happened to the file."""
    at = rng.randrange(len(content))
    return rng.choice(
        (
            content[:at],
            content[at:],
            flipped(content, rng),
            flipped(content, rng, num_flips=20),
            content[:at] + rng.randbytes(5) + content[at:],
            content[:at] + content[at + 5 :],
            content.replace(b"\n", b"\r\n"),
            b"\xef\xbb\xbf" + content,
            gzip.compress(content),
            content.replace(b'"', b"\x00", 1),
            rng.randbytes(200),
            content + content,
        )
    )


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt"])
def test_a_damaged_file_is_read_or_refused_in_one_line(
    kind: str, amount: int, tmp_path: Path, faults_record: FaultsRecord
):
    """Flipped bits that leave a file what it is cannot be seen: they are other text."""
    rng, file = random.Random(31), tmp_path / f"data.{kind}"
    whole = b"One line.\nAnother line of text.\n" * 20 if kind == "txt" else written(kind, DOLLY)
    num_refused = 0
    for _ in range(amount):
        file.write_bytes(spoiled(whole, rng))
        try:
            prepare(file)
        except DataError as error:
            num_refused += 1
            checked_line(str(error), file)
    assert num_refused > 0
    faults_record(f"data: damaged .{kind}", injected=amount, survived=amount)


def chat(*messages: Any) -> bytes:
    return json.dumps({"messages": messages}).encode()


LONG = "word " * 2_000_000  # 10 MB
HOSTILE: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", r"^\*: no records$"),
    "only blank lines": ("a.jsonl", b"\n \n\t\n", "no records$"),
    "an empty list": ("a.json", b"[]", "no records$"),
    "an object": ("a.json", b'{"data": []}', "not a JSON list of records"),
    "only a header": ("a.csv", b"instruction,response\n", "no records$"),
    "two columns of a name": ("a.csv", b"text,text\na,b\nc,d\n", 'line 1: has two columns called "text"'),
    "a column without a name twice": ("a.csv", b"text,,\na,b,c\n", 'line 1: has two columns called ""'),
    "only white space": (
        "a.jsonl",
        b'{"text": " \\n\\t"}\n{"text": "\\u3000"}',
        r"no records; 2 are malformed, first \*, line 1: text: empty",
    ),
    "an answer of white space": (
        "a.jsonl",
        b'{"instruction": "Hi", "response": "\\n"}',
        "line 1: response: empty",
    ),
    "one record": ("a.jsonl", GOOD.encode(), "1 of 1 records of .* leave none to train on"),
    "more held out than there is": ("a.jsonl", f"{GOOD}\n{GOOD}".encode(), "9 of 2 records .* use fewer"),
    "gzip": (
        "a.jsonl",
        gzip.compress(GOOD.encode() * 99),
        r"no records; \d are malformed, first \*, line 1: not ",
    ),
    "lone surrogates": ("a.jsonl", b'{"text": "\\ud800"}', "line 1: text: not UTF-8 text"),
    "a name that terminals obey": ("a.jsonl", b'{"\\u001b[2J\\n": 1}', r"columns are \\x1b\[2J; expected"),
    "nested beyond reason": ("a.jsonl", b'{"text": ' * 100_000, "line 1: not JSON"),
    "digits beyond reason": ("a.jsonl", b'{"text": ' + b"9" * 9999 + b"}", "line 1: not JSON"),
    "zero bytes": ("a.jsonl", bytes(5000), "line 1: not JSON"),
    "UTF-16": ("a.csv", "text\na\nb\n".encode("utf-16"), "columns are|no records"),
    "text as Parquet": ("a.parquet", b"instruction,response\n" * 99, "not a complete Parquet file"),
    "a picture": ("a.png", b"\x89PNG", r"cannot be read as data; expected \.csv"),
    "roles out of order": (
        "a.jsonl",
        chat({"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}),
        r"messages\[0\]\.role: 'assistant' cannot stand here",
    ),
    "a role of 10 MB": (
        "a.jsonl",
        chat({"role": LONG, "content": "a"}),
        r"role: 'word word .*\.\.\. cannot stand",
    ),
    "content in parts": (
        "a.jsonl",
        chat({"role": "user", "content": [{"type": "text", "text": "a"}]}),
        r"messages\[0\]\.content: must be a string, got list",
    ),
    "a null message": ("a.jsonl", chat(None), r"messages\[0\]: must be an object"),
}
"""File name, content, and what the line says."""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_the_place(name: str, tmp_path: Path, faults_record: FaultsRecord):
    file_name, content, said = HOSTILE[name]
    file = tmp_path / file_name
    file.write_bytes(content)
    options = {"validation_records": 9} if name.startswith("more") else {}
    line = refusal(file, **options)
    assert re.search(said, line), line
    faults_record("data: hostile files", injected=1, survived=1)


def test_hostile_folders_are_refused_in_one_line(tmp_path: Path, faults_record: FaultsRecord):
    folder, loop = tmp_path / "folder", tmp_path / "loop.jsonl"
    (folder / "train.jsonl").mkdir(parents=True)
    loop.symlink_to(loop)
    (tmp_path / "empty").mkdir()
    said = {
        folder: r"^\*/train\.jsonl: cannot be read \(Is a directory\)",
        tmp_path / "empty": "no training file; expected train.jsonl",
        loop: "no such file or folder",
        tmp_path / ("a" * 300): "no such file or folder",
        Path("~nobody-here/data.jsonl"): "no such file or folder",
    }
    for path, pattern in said.items():
        line = refusal(path)
        assert re.search(pattern, line), line
    faults_record("data: hostile folders", injected=len(said), survived=len(said))


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path):
    plain, odd = tmp_path / "plain.jsonl", tmp_path / "odd.jsonl"
    plain.write_bytes(written("jsonl", DOLLY))
    odd.write_bytes(b"\xef\xbb\xbf" + written("jsonl", DOLLY).replace(b"\n", b"\r\n"))
    one, other = prepare(plain), prepare(odd)
    assert one.validation_examples == other.validation_examples
    assert one.record_lengths.equal(other.record_lengths)


def test_more_malformed_records_than_allowed_end_the_run_at_once(tmp_path: Path, faults_record: FaultsRecord):
    """Not after 10 million of them."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"{oops\n" * 20_000)
    line = refusal(file)
    assert line.startswith("*, line 1: not JSON")
    assert "the first of more than 10 malformed records, the last is *, line 11;" in line
    faults_record("data: malformed rows", injected=20_000, survived=20_000)


def test_validation_larger_than_the_data_is_used_whole(tmp_path: Path):
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    small.write_bytes(written("jsonl", DOLLY[:2]))
    large.write_bytes(written("jsonl", DOLLY * 3))
    ledger = prepare(small, validation=str(large)).ledger
    assert (ledger.training.records, ledger.validation.records) == (2, 36)


@pytest.mark.faults
def test_a_line_of_10_megabytes_is_read_whole(tmp_path: Path, faults_record: FaultsRecord):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": LONG}), GOOD, json.dumps({"instruction": LONG, "response": "a"})]
    file.write_text("\n".join(lines), encoding="utf-8")
    data = prepare(file, validation_records=1)
    tally = data.ledger.training
    assert tally.records == 2
    assert data.ledger.malformed == []
    assert tally.tokens_read + tally.tokens_repeated == (
        tally.tokens_labelled + tally.tokens_masked + tally.tokens_dropped
    )
    faults_record("data: lines of 10 MB", injected=2, survived=2)


@pytest.mark.parametrize(
    "amount", [pytest.param(5, id="few"), pytest.param(600, id="many", marks=pytest.mark.faults)]
)
@pytest.mark.parametrize("name", ["rows.safetensors", "manifest.json"])
def test_flipped_bits_in_kept_rows_never_give_other_rows(
    name: str, amount: int, tmp_path: Path, faults_record: FaultsRecord
):
    """Nor another account of them: wherever the bits are, the rows are made anew."""
    rng, file = random.Random(32), tmp_path / "data.jsonl"
    file.write_bytes(written("jsonl", DOLLY))
    cached: dict[str, Any] = {"cache": True, "cache_dir": str(tmp_path / "cache")}
    expected = described(prepare(file, **cached))
    kept = sorted((tmp_path / "cache" / "rows").glob(f"*/{name}"))
    whole = {path: path.read_bytes() for path in kept}
    assert len(kept) == 2  # of training and of validation
    for _ in range(amount):
        path = rng.choice(kept)
        path.write_bytes(flipped(whole[path], rng, num_flips=rng.choice((1, 1, 2, 8))))
        assert described(prepare(file, **cached)) == expected
    faults_record(f"kept rows: bits of {name}", injected=amount, survived=amount)


def described(data: PreparedData) -> tuple[Any, ...]:
    """Return all that a run is told of its data."""
    batches = [batch for step in range(3) for batch in data.batches.step(step, 1)]
    tables = [
        {name: value.tolist() for name, value in vars(batch).items() if hasattr(value, "tolist")}
        for batch in [*batches, *data.validation_batches]
    ]
    assert tables
    assert tables[0]
    return tables, data.ledger.to_json(), data.record_lengths.tolist()
