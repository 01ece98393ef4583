"""Seeded mutations of every shipped document: each is accepted or refused in one line, never a traceback, and
no unknown key is passed over."""

import copy
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shipped_documents import DOCUMENTS, processes_of

from sparse_llama.config.run import Overrides, load_run
from sparse_llama.config.section import join_path
from sparse_llama.errors import ConfigError

NUM_MUTATIONS = 400
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63 - 1, -(2**63) + 1, 0.5, -0.0, 1e-320, 1e308, "", "auto", "x",
    "cpu", "nvme", "\u2603\n", "\ud800", "\0", "bundled:", [], [[]], [None], [1, "a"], {}, {"a": {}}, {"": 1},
    {"device": "cpu"}, {"enabled": True}, {"type": "AdamW"}, {"mode": "dense"}, {"stage": 3},
]  # fmt: skip
FLAGS: list[dict[str, Any]] = [
    {}, {"zero_stage": 3, "offload": "cpu"}, {"steps": 3}, {"epochs": 1, "lr": 1e-4}, {"attention": "dense"},
    {"seq_length": 64, "seed": 5}, {"adapter": "v1", "model": "a/b", "dataset": "c/d"}, {"zero_stage": 1},
]  # fmt: skip


def blocks_of(value: Any, path: str = "") -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every object in a document, with its path."""
    if isinstance(value, dict):
        yield value, path
        for key, inner in value.items():
            yield from blocks_of(inner, join_path(path, key))


def outcome(text: str, path: Path, flags: dict[str, Any], processes: int = 1) -> str | None:
    """Return the line that refuses the document; None if it is accepted."""
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        run = load_run(path, Overrides(output_dir=path.parent / "out", **flags), processes, is_here=False)
    except ConfigError as error:
        line = str(error)
        assert line.isascii(), line
        assert "\n" not in line
        assert len(line.removeprefix(str(path))) < 400, line
        return line
    json.dumps(run.to_json(), allow_nan=False)
    return None


def without_comments(path: Path) -> dict[str, Any]:
    def drop(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if not key.startswith("_")}

    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=drop)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_a_value_replaced_or_left_out_is_accepted_or_refused_in_one_line(document: Path, tmp_path: Path):
    rng = random.Random(20)
    plain = without_comments(document)
    outcomes = []
    for _ in range(NUM_MUTATIONS):
        mutated = copy.deepcopy(plain)
        for _ in range(rng.choice((1, 1, 2))):
            block, _path = rng.choice([pair for pair in blocks_of(mutated) if pair[0]])
            key = rng.choice(list(block))
            if rng.random() < 0.2:
                del block[key]
            else:
                block[key] = copy.deepcopy(rng.choice(JUNK))
            if not mutated:
                break
        flags = rng.choice(FLAGS)
        outcomes.append(outcome(json.dumps(mutated), tmp_path / "mine.json", flags, processes_of(document)))
    assert 20 < outcomes.count(None) < NUM_MUTATIONS - 100


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_an_unknown_key_anywhere_is_refused_and_named(document: Path, tmp_path: Path):
    rng = random.Random(21)
    plain = without_comments(document)
    for _ in range(NUM_MUTATIONS):
        mutated = copy.deepcopy(plain)
        block, path = rng.choice(list(blocks_of(mutated)))
        known = list(block)
        if known and rng.random() < 0.5:  # a misspelt key
            old = rng.choice(known)
            at = rng.randrange(len(old))
            key = old[:at] + rng.choice("qzj".replace(old[at], "")) + old[at + 1 :]
            block[key] = block.pop(old) if old not in ("mode", "type") else block[old]
        else:
            key = "q" + "".join(
                rng.choice(string.ascii_lowercase + " .\u00e9") for _ in range(rng.randrange(1, 9))
            )
            block[key] = rng.choice(JUNK)
        line = outcome(json.dumps(mutated), tmp_path / "mine.json", {}, processes_of(document))
        where = join_path(path, key)
        assert line is not None, where
        assert line.startswith(f"{tmp_path / 'mine.json'}: {where}: "), line


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_a_damaged_file_is_refused_in_one_line_or_still_says_the_same(document: Path, tmp_path: Path):
    rng = random.Random(22)
    text = document.read_text(encoding="utf-8")
    for _ in range(NUM_MUTATIONS):
        at = rng.randrange(len(text))
        damage = rng.choice(("cut", "drop", "insert", "double"))
        if damage == "cut":
            damaged = text[:at]
        elif damage == "drop":
            damaged = text[:at] + text[at + 1 :]
        elif damage == "insert":
            damaged = text[:at] + rng.choice('{}[]",:0-eE#/\\\u2603') + text[at:]
        else:
            damaged = text[:at] + text[at : at + 40] + text[at:]
        outcome(damaged, tmp_path / "mine.json", {})
