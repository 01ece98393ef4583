"""Strict, frozen blocks of a configuration, and their mistakes in one line.

pydantic finds the mistakes; what it says about them is rewritten: the key path as the user typed it, what was
found, what is allowed. Of several mistakes the first is told, unknown keys before anything else: a misspelt
key is usually the cause of a "missing" one.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Self, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from sparse_llama.errors import ConfigError

_MAX_SHOWN = 60  # characters of a value that a message repeats
_MAX_PLAIN = 200  # of another program's words
_TYPES = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "string": "a string",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object",
    "model": "an object",
    "model_attributes": "an object",
    "none": "null",
}


class UnknownKeyError(ConfigError):
    """A block has a key that nobody knows."""


class Section(BaseModel):
    """A block of the document: unknown keys and coerced types are mistakes, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, block: object, path: str = "") -> Self:
        """Return ``block`` as this section.

        Args:
            path: where the block stands in the document, such as ``sparse_llama``; empty for the document
                itself.

        Raises:
            ConfigError: in one line, which key is wrong, what was found, and what is allowed.
        """
        try:
            return cls.model_validate(block)
        except ValidationError as error:
            unknown = any(mistake["type"] == "extra_forbidden" for mistake in error.errors())
            raise (UnknownKeyError if unknown else ConfigError)(explain(error, cls, path)) from None

    @classmethod
    def known_keys(cls) -> list[str]:
        """Return the keys that a document may use, historical spellings included."""
        names = {name: None for name in cls.model_fields}
        names |= {field.alias: None for field in cls.model_fields.values() if field.alias is not None}
        return list(names)


def integral(value: object) -> object:
    """Return a float without fraction as the int that DeepSpeed takes it for: ``5e8`` is how bucket sizes are
    written."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def only(allowed: object, because: str) -> AfterValidator:
    """Return a validator that refuses every value but ``allowed``, a choice of DeepSpeed's that is not
    supported here."""

    def check(value: object) -> object:
        if value != allowed:
            raise ValueError(
                f"{show(value)} is not supported: {because}; use {show(allowed)} or leave the key out"
            )
        return value

    return AfterValidator(check)


def either(wanted: str) -> WrapValidator:
    """Return a validator that tells the mistakes of a union as one, ``must be`` and what is ``wanted``;
    pydantic tells one for every member, with the member's name in the key path."""

    def check(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {wanted}, got {show(value)}") from None

    return WrapValidator(check)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


IntegralInt = Annotated[int, BeforeValidator(integral)]
"""An int that may be written as an integral float."""
FrozenList = BeforeValidator(_as_tuple)
"""Lets a JSON list be a tuple, so that a frozen section holds nothing that can change."""


def show(value: object) -> str:
    """Return ``value`` as JSON writes it, in one short ASCII line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = ascii(value)
    return _cut(text)


def show_plain(text: str) -> str:
    """Return the beginning of what another program says, such as a library's error, in one printable line."""
    line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in " ".join(text.split()))
    return line if len(line) <= _MAX_PLAIN else line[: _MAX_PLAIN - 3] + "..."


def quote(name: str) -> str:
    """Return a name that was looked for as messages repeat it: in quotes, ASCII, short."""
    return _cut(ascii(name))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def join_path(path: str, *parts: str | int) -> str:
    """Return the dotted path of a key; keys that are no plain word are quoted, list positions in brackets,
    and the middle of what is too long for a line is left out."""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            is_word = part.isidentifier() and part.isascii() and len(part) <= _MAX_SHOWN
            name = part if is_word else show(part)
            path = f"{path}.{name}" if path else name
    return path if len(path) <= 4 * _MAX_SHOWN else f"{path[: 2 * _MAX_SHOWN]}...{path[-_MAX_SHOWN:]}"


COMMENT_HINT = '; leave it out, or start it with "_" to make it a comment'


def alternatives(words: Sequence[str]) -> str:
    """Return ``1, 2 or 4`` of 1, 2 and 4."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def suggest(key: str, candidates: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest candidate, the list of all where none is near and it is
    short."""
    names = list(candidates)
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(key.lower(), lowered, n=1, cutoff=0.7)
    if near:
        return f"; did you mean {lowered[near[0]]!r}?"
    listed = ", ".join(names)
    return f"; allowed: {listed}" if listed and len(listed) < 240 else ""


def explain(error: ValidationError, section: type[Section], path: str) -> str:
    """Return the first mistake that pydantic found in ``section`` at ``path`` as one line."""
    mistakes = error.errors(include_url=False)
    mistake: Mapping[str, Any] = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    location = [part for part in mistake["loc"] if isinstance(part, int | str)]
    where = join_path(path, *location) or "the document"
    kind, context, found = mistake["type"], mistake.get("ctx", {}), show(mistake["input"])
    if kind == "extra_forbidden":
        key, known = str(location[-1]), _keys_at(section, location[:-1])
        if key in known:
            other = next(name for name in known if name.endswith(f"_{key}"))
            return f"{where}: given twice, also as {other}; keep one of them"
        return f"{where}: unknown key{suggest(key, known) or COMMENT_HINT}"
    if kind == "missing" and isinstance(location[-1], int):
        where = join_path(path, *location[:-1])
        return f"{where}: must have more than {location[-1]} {_entries(location[-1])}, got {found}"
    if kind == "missing":
        return f"{where}: missing; this key is required"
    if kind == "value_error":
        return f"{where}: {context['error']}"
    if kind in {"literal_error", "enum"}:
        hint = suggest(mistake["input"], _literals(context)) if isinstance(mistake["input"], str) else ""
        hint = hint if hint.startswith("; did") else ""
        return f"{where}: must be {context['expected']}, got {found}{hint}"
    for ending, wanted in (
        ("greater_than_equal", f">= {context.get('ge')}"),
        ("greater_than", f"> {context.get('gt')}"),
        ("less_than_equal", f"<= {context.get('le')}"),
        ("less_than", f"< {context.get('lt')}"),
    ):
        if kind == ending:
            return f"{where}: must be {wanted}, got {found}"
    if kind in {"too_short", "too_long", "string_too_short"}:
        return f"{where}: must have {_length(context)}, got {found}"
    wanted = _TYPES.get(kind.removesuffix("_type").removesuffix("_parsing"))
    if wanted is not None:
        return f"{where}: must be {wanted}, got {found}"
    return f"{where}: {mistake['msg']}, got {found}"


def _literals(context: Mapping[str, Any]) -> list[str]:
    return [part.strip("' ") for part in str(context["expected"]).replace(" or ", ",").split(",")]


def _length(context: Mapping[str, Any]) -> str:
    bound, number = ("at least", "min_length") if "min_length" in context else ("at most", "max_length")
    return f"{bound} {context[number]} {_entries(context[number])}"


def _entries(number: int) -> str:
    return "entry" if number == 1 else "entries"


def _keys_at(section: type[Section], location: list[str | int]) -> list[str]:
    """Return the keys of the section that lies at ``location`` inside ``section``; none where it is no
    section."""
    is_entry = False
    for part in location:
        if is_entry:  # of a list or an object of sections
            is_entry = False
            continue
        fields = section.model_fields.values()
        named = section.model_fields.get(str(part)) or next((f for f in fields if f.alias == part), None)
        inner = None if named is None else _section_in(named.annotation)
        if inner is None or named is None:
            return []
        section, is_entry = inner, _holds_entries(named.annotation)
    return section.known_keys()


def _holds_entries(annotation: object) -> bool:
    if get_origin(annotation) in (dict, list, tuple):
        return True
    return any(_holds_entries(part) for part in getattr(annotation, "__args__", ()))


def _section_in(annotation: object) -> type[Section] | None:
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Section) else None
    parts = getattr(annotation, "__args__", ())
    return next((found for part in parts if (found := _section_in(part)) is not None), None)
