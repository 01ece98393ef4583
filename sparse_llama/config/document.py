"""Reading a JSON file strictly: every key once, every number finite, and keys that start with ``_`` are
comments."""

import json
import math
from pathlib import Path
from typing import Any

from sparse_llama.config.section import join_path
from sparse_llama.errors import ConfigError

MAX_DEPTH = 64
MAX_BYTES = 2**24
"""Of a document; a file of more is another one, such as a model's weights, and not worth reading."""


class _Pairs(list[tuple[str, Any]]):
    """An object's keys and values as written, duplicates included."""


class _NotFinite:
    def __init__(self, name: str) -> None:
        self.name = name


def read_document(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path`` without its comments.

    Raises:
        ConfigError: the file cannot be read, is not JSON, is no object, or has a duplicate key or a number
            that is not finite; without the file's name, except where the file itself is the mistake.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path}: more than {MAX_BYTES:,} bytes; name a JSON file")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a folder; name a JSON file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason})") from None
    return parse_document(text)


def parse_document(text: str) -> dict[str, Any]:
    """Return the JSON object in ``text`` without its comments; what is refused is ``read_document``'s."""
    try:
        parsed = json.loads(text, object_pairs_hook=_Pairs, parse_constant=_NotFinite)
    except json.JSONDecodeError as error:
        rest = text[error.pos :].lstrip()
        hint = '; comments are keys that start with "_"' if rest.startswith(("//", "#", "/*")) else ""
        raise ConfigError(f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise ConfigError(f"nested too deeply; {MAX_DEPTH} levels are allowed") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise ConfigError(f"not JSON: {str(error).split(';')[0]}") from None
    if not isinstance(parsed, _Pairs):
        raise ConfigError("must be a JSON object: {...}")
    return _check(parsed, "", 0)


def _check(value: Any, path: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ConfigError(f"nested too deeply; {MAX_DEPTH} levels are allowed")
    if isinstance(value, _Pairs):
        block: dict[str, Any] = {}
        for key, inner in value:
            if key.startswith("_"):
                continue
            where = join_path(path, key)
            if key in block:
                raise ConfigError(f"{where}: given twice; keep one of them")
            block[key] = _check(inner, where, depth + 1)
        return block
    if isinstance(value, list):
        return [_check(inner, join_path(path, index), depth + 1) for index, inner in enumerate(value)]
    if isinstance(value, _NotFinite):
        raise ConfigError(f"{path}: must be a finite number, got {value.name}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: must be a finite number, got one beyond 1.8e308")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        raise ConfigError(f"{path}: must fit in 64 bits")
    return value
