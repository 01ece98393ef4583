"""Reading the file: what is not one strict JSON object is refused with the place of the mistake."""

import ctypes.util
from pathlib import Path

import pytest

from sparse_llama.config.document import parse_document, read_document
from sparse_llama.config.run import Overrides, load_run
from sparse_llama.errors import ConfigError

REFUSED = {
    '{"a": 1': "line 1, column 8: not JSON: Expecting ',' delimiter",
    "": "line 1, column 1: not JSON: Expecting value",
    "{'a': 1}": "line 1, column 2: not JSON: Expecting property name enclosed in double quotes",
    '{"a": True}': "line 1, column 7: not JSON: Expecting value",
    '{"a": 1}\n{}': "line 2, column 1: not JSON: Extra data",
    "// mine\n{}": 'line 1, column 1: not JSON: Expecting value; comments are keys that start with "_"',
    '{"a": 1 # one\n}': (
        "line 1, column 9: not JSON: Expecting ',' delimiter; comments are keys that start with \"_\""
    ),
    "[]": "must be a JSON object: {...}",
    "null": "must be a JSON object: {...}",
    '{"a": 1, "a": 2}': "a: given twice; keep one of them",
    '{"a": {"b": [{"c": 1, "d": 2, "c": 1}]}}': "a.b[0].c: given twice; keep one of them",
    '{"a": {"b": NaN}}': "a.b: must be a finite number, got NaN",
    '{"a": [0, -Infinity]}': "a[1]: must be a finite number, got -Infinity",
    '{"a": 1e999}': "a: must be a finite number, got one beyond 1.8e308",
    '{"a": 9223372036854775808}': "a: must fit in 64 bits",
    '{"a": ' + "9" * 5000 + "}": (
        "not JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"
    ),
    '{"a":' * 70 + "1" + "}" * 70: "nested too deeply; 64 levels are allowed",
    '{"a":' * 100_000: "nested too deeply; 64 levels are allowed",
}


@pytest.mark.parametrize(("text", "line"), REFUSED.items(), ids=[text[:24] for text in REFUSED])
def test_what_is_no_strict_json_object_is_refused_at_its_place(text: str, line: str):
    with pytest.raises(ConfigError) as refused:
        parse_document(text)
    assert str(refused.value) == line


def test_keys_that_start_with_an_underscore_are_comments_at_every_depth_whatever_they_hold():
    text = '{"_a": NaN, "_a": 1, "b": {"_c": "auto", "d": [{"_e": 1, "f": 2}]}}'
    assert parse_document(text) == {"b": {"d": [{"f": 2}]}}


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path):
    path = tmp_path / "bom.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_document(path) == {"a": 1}


def test_a_file_that_cannot_be_read_is_named_once_with_the_reason(tmp_path: Path):
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    (tmp_path / "utf16.json").write_bytes('{"a": 1}'.encode("utf-16"))
    reasons = {
        "missing.json": "no such file",
        "latin.json": "not UTF-8 text (byte 7)",
        "utf16.json": "not UTF-8 text (byte 0)",
        "": "a folder; name a JSON file",
        "nul\0.json": "cannot be read (embedded null byte)",
    }
    for name, reason in reasons.items():
        path = tmp_path / name
        with pytest.raises(ConfigError) as refused:
            load_run(path, Overrides(output_dir=tmp_path / "out"), 1)
        assert str(refused.value) == f"{path}: {reason}"


def test_a_mistake_in_a_document_begins_with_the_files_name_and_one_in_the_default_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "typo.json"
    path.write_text('{"train_batch_sise": 4}', encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_run(path, Overrides(), 1)
    assert str(refused.value) == f"{path}: train_batch_sise: unknown key; did you mean 'train_batch_size'?"
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    nvme = Overrides(zero_stage=3, offload="nvme", nvme_path=tmp_path, output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^the embedded cpu_demo\.json: zero_optimization\."):
        load_run(None, nvme, 1)
