"""Seeded damage to JSON documents: what people mistype, what editors leave behind, what disks do."""

import copy
import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_RAW = "@raw@"
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 1000, 2**31, 2**40, 2**63 - 1, 2**63, 2**70, -(2**63), -(2**70), 0.5,
    -0.0, 1e-320, 1e308, -1e308, 3.0, 5e8, float("nan"), float("inf"), float("-inf"), f"{_RAW}1e400",
    f"{_RAW}{'9' * 5000}", f"{_RAW}-0", f"{_RAW}00", f"{_RAW}0x10", f"{_RAW}.5", f"{_RAW}True",
    f"{_RAW}None", f"{_RAW}undefined", "", " ", "auto", "x", "cpu", "nvme", "none", "dense", "1", "true",
    "null", "NaN", "\u2603\n", "\ud800", "\0", "\x1b[31m", "[bold]x[/bold]", "bundled:",
    "bundled:tiny-llama", "../..", "/", "~", "~nobody-here/x", "a" * 300, "b" * 100_000,
    "https://user:secret@example.com/x", "$(touch x)", "`touch x`", "; rm -rf x", "%s", "{0}", [], [[]],
    [None], [1, "a"], [0] * 5000, [{}], ["x"], {}, {"a": {}}, {"": 1}, {"\u2603": 1}, {"a" * 300: 1},
    {"device": "cpu"}, {"device": "nvme"}, {"enabled": True}, {"type": "AdamW"}, {"type": "WarmupLR"},
    {"mode": "dense"}, {"mode": "mask", "path": "."}, {"stage": 3}, "0:2", "::0", "::-1", [0, -1], [-1],
    [2**62],
]  # fmt: skip
"""Values of any type, of any size; some are no JSON."""
TOKENS = '{}[]",:0-+.eE#/\\\u2603\x00\x07\ufeff \n'


def without_comments(path: Path) -> dict[str, Any]:
    """Return the document in ``path`` without the keys that are comments."""

    def drop(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if not key.startswith("_")}

    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=drop)


def mutated(document: dict[str, Any], rng: random.Random) -> str:
    """Return the text of ``document`` with one to three values, keys or blocks of it changed."""
    changed = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(CHANGES)(changed, rng)
    return _text(changed)


def damaged(text: str, rng: random.Random) -> bytes:
    """Return the bytes of ``text`` after something has happened to the file."""
    at = rng.randrange(len(text))
    content = text.encode()
    kind = rng.randrange(14)
    if kind == 0:
        return text[:at].encode()
    if kind == 1:
        return (text[:at] + text[at + 1 :]).encode()
    if kind == 2:
        return (text[:at] + rng.choice(TOKENS) + text[at:]).encode()
    if kind == 3:
        return (text[:at] + text[at : at + 40] + text[at:]).encode()
    if kind == 4:
        return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at + 8 :]
    if kind == 5:
        flipped = bytearray(content)
        for place in rng.sample(range(len(content)), 3):
            flipped[place] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 6:
        return b"\xef\xbb\xbf" * rng.choice((1, 2)) + content
    if kind == 7:
        return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32")))
    if kind == 8:
        comment = rng.choice(("// why\n", "/* why */", "# why\n"))
        return (text[:at] + comment + text[at:]).encode()
    if kind == 9:
        return text.replace("}", ",}", 1).replace('"', "'", rng.choice((0, 999))).encode()
    if kind == 10:
        return rng.choice((b"", b" ", b"[%s]", b'"%s"', b"%s%s", b"null", b"3", b"[]", b"{}")).replace(
            b"%s", content
        )
    if kind == 11:
        depth = rng.choice((60, 70, 500, 100_000))
        opened = rng.choice(('{"a":', "["))
        return (opened * depth + "1" + ("}" if opened[0] == "{" else "]") * depth).encode()
    if kind == 12:
        return rng.randbytes(rng.choice((1, 100, 10_000)))
    return content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\x00", b"\x85")))


def misspelt(document: dict[str, Any], rng: random.Random) -> tuple[str, list[str | int]]:
    """Return the text of ``document`` with a key that nobody knows, and the path of that key."""
    changed = copy.deepcopy(document)
    path, block = rng.choice(list(_named_blocks(changed, [])))
    if block and rng.random() < 0.5:
        old = rng.choice(list(block))
        at = rng.randrange(len(old))
        key = old[:at] + rng.choice("qzj".replace(old[at], "")) + old[at + 1 :]
        block[key] = block.pop(old) if old not in ("mode", "type") else block[old]
    else:
        letters = string.ascii_lowercase + " .\u00e9"
        key = "q" + "".join(rng.choice(letters) for _ in range(rng.randrange(1, 9)))
        block[key] = rng.choice([None, True, 0, "x", [], {}, {"a": 1}])
    return json.dumps(changed), [*path, key]


def _named_blocks(value: Any, path: list[str | int]) -> Iterator[tuple[list[str | int], dict[str, Any]]]:
    """Yield every object in a value with its path."""
    if isinstance(value, dict):
        yield path, value
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from _named_blocks(inner, [*path, key])


def flipped(
    content: bytes, rng: random.Random, *, num_flips: int = 1, first: int = 0, last: int = 0
) -> bytes:
    """Return ``content`` with bits flipped, those between ``first`` and ``last``; 0 is its end."""
    changed = bytearray(content)
    for _ in range(num_flips):
        changed[rng.randrange(first, last or len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _places(value: Any) -> Iterator[tuple[Any, str | int]]:
    """Yield every place of a value: an object and its key, or a list and its index."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(inside):
        yield value, key
        yield from _places(inner)


def _blocks(value: Any) -> list[dict[str, Any]]:
    return [value, *(block[key] for block, key in _places(value) if isinstance(block[key], dict))]


def _replace(document: dict[str, Any], rng: random.Random) -> None:
    places = list(_places(document))
    if places:
        block, key = rng.choice(places)
        block[key] = copy.deepcopy(rng.choice(JUNK))


def _drop(document: dict[str, Any], rng: random.Random) -> None:
    places = list(_places(document))
    if places:
        block, key = rng.choice(places)
        del block[key]


def _misspell(document: dict[str, Any], rng: random.Random) -> None:
    block = rng.choice([one for one in _blocks(document) if one] or [{}])
    if block:
        old = rng.choice(list(block))
        at = rng.randrange(len(old) + 1)
        new = rng.choice(
            (old[:at] + rng.choice("qzj\u00e9 .") + old[at + 1 :], old.upper(), f" {old}", old[:at])
        )
        block[new] = block.pop(old)


def _double(document: dict[str, Any], rng: random.Random) -> None:
    """Give a key twice, which no dict can: ``_text`` takes the mark out."""
    block = rng.choice([one for one in _blocks(document) if one] or [{}])
    if block:
        key = rng.choice(list(block))
        block[f"{key}{_RAW}"] = rng.choice((copy.deepcopy(block[key]), 1, None))


def _add(document: dict[str, Any], rng: random.Random) -> None:
    key = rng.choice(
        ("", "x", "\u2603", "a.b", "a" * 1000, "\n", "auto", "mode", "type", "params", "stage", "\ud800")
    )
    rng.choice(_blocks(document))[key] = copy.deepcopy(rng.choice(JUNK))


def _retype(document: dict[str, Any], rng: random.Random) -> None:
    places = list(_places(document))
    if not places:
        return
    block, key = rng.choice(places)
    value = block[key]
    changes: tuple[Callable[[Any], Any], ...] = (
        str,
        lambda it: [it],
        lambda it: {"value": it},
        lambda it: [it] * 3,
    )
    if isinstance(value, int | float):
        changes += (float, lambda it: -it, lambda it: it * 2**40, lambda it: it + 1, lambda it: it / 3, bool)
    if isinstance(value, dict):
        changes += (
            lambda it: list(it),
            lambda it: list(it.values()),
            lambda it: [[k, v] for k, v in it.items()],
        )
    block[key] = rng.choice(changes)(value)


def _swap(document: dict[str, Any], rng: random.Random) -> None:
    places = list(_places(document))
    if len(places) > 1:
        (one, first), (other, second) = rng.sample(places, 2)
        one[first], other[second] = copy.deepcopy(other[second]), copy.deepcopy(one[first])


def _nest(document: dict[str, Any], rng: random.Random) -> None:
    places = list(_places(document))
    if places:
        block, key = rng.choice(places)
        for _ in range(rng.choice((1, 30, 70))):
            block[key] = {key: block[key]} if isinstance(key, str) else [block[key]]


CHANGES = (_replace, _replace, _replace, _drop, _misspell, _double, _add, _retype, _retype, _swap, _nest)


def _text(document: dict[str, Any]) -> str:
    """Return the document as text, the marks of what is no JSON taken out."""
    text = json.dumps(document)
    while f'"{_RAW}' in text:
        at = text.index(f'"{_RAW}')
        end = text.index('"', at + 1)
        text = text[:at] + text[at + 1 + len(_RAW) : end] + text[end + 1 :]
    return text.replace(_RAW, "")
