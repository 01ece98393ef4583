"""Which layouts ``launch/show_layout.py`` is asked to show; decided without torch."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sparse_llama.cli.layout_words import in_short, ranges
from sparse_llama.config.bundled import resolve_bundled
from sparse_llama.config.combinations import check_lengths
from sparse_llama.config.deepspeed import check_document
from sparse_llama.config.document import parse_document, read_document
from sparse_llama.config.layers import LayerSparsities, layer_sparsities
from sparse_llama.config.paths import expand, is_folder
from sparse_llama.config.run import EMBEDDED
from sparse_llama.config.settings import ModelSettings
from sparse_llama.config.sparsity import MODES, Sparsity
from sparse_llama.errors import ConfigError

DEFAULT_HEADS = 32  # LLaMA-7B's
DEFAULT_TOKENS = 8192
Read = TypeVar("Read")


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share a layout."""

    name: str
    sparsity: Sparsity | None
    """None is dense."""
    share: float | None
    """Of the layers; None where it is not known how many the model has."""


@dataclass(frozen=True)
class Choice:
    """What the file and the flags ask to see."""

    groups: tuple[LayerGroup, ...]
    num_heads: int
    seed: int
    master_length: int
    """Tokens of the longest sequence, whose layouts are cropped."""
    documents: tuple[tuple[int, int], ...]
    """Tokens [first, last) of each document of the row."""


def choose(arguments: argparse.Namespace) -> Choice:
    """Return what the flags of ``show_layout_parser`` ask for.

    Raises:
        ConfigError: they or the file are mistaken.
    """
    if arguments.ds_config is not None and arguments.sparse_attention is not None:
        raise ConfigError("--ds_config and --sparse_attention are both given; keep one of them")
    for name, least in (("seq_length", 1), ("num_heads", 1), ("num_layers", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and not least <= value < 2**31:
            raise ConfigError(f"--{name}: must be >= {least} and < 2**31, got {value}")
    if arguments.sparse_attention is not None:
        document = {"sparse_attention": _block(arguments.sparse_attention)}
        label = "--sparse_attention"
    else:
        path = EMBEDDED if arguments.ds_config is None else arguments.ds_config
        label = "the embedded cpu_demo.json" if arguments.ds_config is None else str(path)
        document = _told(label, lambda: read_document(path))
    return _told(label, lambda: _resolve(document, arguments))


def _resolve(document: dict[str, Any], arguments: argparse.Namespace) -> Choice:
    checked = check_document(document)
    written = checked.sparse_llama
    is_file = arguments.sparse_attention is None
    longest = written.seq_length if is_file else (arguments.seq_length or DEFAULT_TOKENS)
    num_tokens = arguments.seq_length or longest
    # As in a run: a shorter --seq_length crops the file's layout, the pattern stays.
    master_length = written.attention.master_length or max(num_tokens, longest)
    attention = written.attention.model_copy(update={"master_length": master_length})
    settings = written.model_copy(update={"seq_length": num_tokens, "attention": attention})
    layouts = layer_sparsities(checked.sparse_attention, attention.layouts, attention.dense_layers)
    check_lengths(settings, layouts)

    config = _model_config(written.model) if is_file else {}
    num_heads = arguments.num_heads or config.get("num_attention_heads", DEFAULT_HEADS)
    if arguments.head is not None and not 0 <= arguments.head < num_heads:
        raise ConfigError(f"--head {arguments.head}: there are {num_heads} heads; give 0 to {num_heads - 1}")
    documents = _documents(arguments.documents, num_tokens, layouts.align)
    if arguments.token is not None:
        find_document(documents, arguments.token)
    num_layers = arguments.num_layers or config.get("num_hidden_layers") or layouts.num_layers
    return Choice(
        groups=_groups(layouts, num_layers, arguments.layer),
        num_heads=num_heads,
        seed=written.seed if arguments.seed is None else arguments.seed,
        master_length=master_length,
        documents=documents,
    )


def _groups(layouts: LayerSparsities, num_layers: int | None, layer: int | None) -> tuple[LayerGroup, ...]:
    """Return the layers that share a layout together, or ``layer`` alone."""
    if num_layers is None:
        return _groups_as_written(layouts, layer)
    resolved = layouts.resolve(num_layers)
    if layer is not None:
        if not 0 <= layer < num_layers:
            raise ConfigError(f"--layer {layer}: there are {num_layers} layers; give 0 to {num_layers - 1}")
        return (LayerGroup(f"layer {layer}", resolved[layer], 1.0),)
    members: dict[Sparsity | None, list[int]] = {}
    for number, sparsity in enumerate(resolved):
        members.setdefault(sparsity, []).append(number)
    if len(members) == 1:
        return (LayerGroup(f"all {num_layers} layers", resolved[0], 1.0),)
    return tuple(
        LayerGroup(_named(own), sparsity, len(own) / num_layers) for sparsity, own in members.items()
    )


def _groups_as_written(layouts: LayerSparsities, layer: int | None) -> tuple[LayerGroup, ...]:
    """Return the groups of a model whose number of layers is not known, by the names that they are given."""
    if not layouts.layouts and layouts.dense_layers is None:
        name = "all layers" if layer is None else f"layer {layer}"
        return (LayerGroup(name, layouts.default, 1.0),)
    if layer is not None:
        raise ConfigError(
            f"--layer {layer}: layers differ, and how many the model has is not known; add --num_layers"
        )
    named: dict[Sparsity | None, list[str]] = {}
    for layers, sparsity in layouts.layouts:
        named.setdefault(sparsity, []).append(_named(layers))
    if layouts.dense_layers is not None:
        named[None] = [_named(layouts.dense_layers)]
    groups = [LayerGroup(" and ".join(names), sparsity, None) for sparsity, names in named.items()]
    return (*groups, LayerGroup("all other layers", layouts.default, None))


def _named(layers: Sequence[int] | str) -> str:
    if isinstance(layers, str):
        return f"layers {layers}"
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {in_short(layers)}"


def _documents(text: str | None, num_tokens: int, align: int) -> tuple[tuple[int, int], ...]:
    """Return where the documents of ``--documents`` lie in a packed row; without the flag one fills it."""
    if text is None:
        return ((0, num_tokens),)
    try:
        lengths = [int(length) for length in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise ConfigError(
            f"--documents: must be lengths of 1 and more with commas, such as 300,500,224; got {text!a}"
        )
    documents: list[tuple[int, int]] = []
    first = 0
    for length in lengths:
        documents.append((first, first + length))
        first += -(-length // align) * align
    taken = documents[-1][1]
    if taken > num_tokens:
        raise ConfigError(
            f"--documents: they take {taken} tokens, each from a multiple of {align} on, and the row has "
            f"{num_tokens}; shorten them, or give --seq_length {taken}"
        )
    return tuple(documents)


def _model_config(model: ModelSettings) -> dict[str, int]:
    """Return the sizes in the model's ``config.json`` if it is on this machine; a picture is no reason to
    download it."""
    folder = resolve_bundled(model.path) or expand(model.path)
    file = folder / "config.json"
    if not is_folder(folder):
        from huggingface_hub import try_to_load_from_cache  # 0.3 s, for models named by a hub id only
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
        except HFValidationError:  # neither a folder nor a hub id
            return {}
        if not isinstance(cached, str):
            return {}
        file = Path(cached)
    try:
        read = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # whether it is a model at all is the run's to find out
        return {}
    return {key: value for key, value in read.items() if isinstance(value, int) and value > 0}


def _block(text: str) -> dict[str, Any]:
    """Return the ``sparse_attention`` block that a flag holds, as JSON or by the mode's name alone."""
    if text in MODES:
        return {"mode": text}
    if not text.lstrip().startswith("{"):
        raise ConfigError(
            f"--sparse_attention: no mode is called {text!a}; allowed: {', '.join(MODES)}, or a block as JSON"
        )
    return _told("--sparse_attention", lambda: parse_document(text))


def find_document(documents: tuple[tuple[int, int], ...], token: int) -> tuple[int, tuple[int, int]]:
    """Return the document that ``token`` is in, and its number from 0.

    Raises:
        ConfigError: it is in none.
    """
    for number, (first, last) in enumerate(documents):
        if first <= token < last:
            return number, (first, last)
    raise ConfigError(f"--token {token}: no such token; the row has tokens {ranges(documents)}")


def _told(label: str, step: Callable[[], Read]) -> Read:
    """Return what ``step`` returns; what it refuses is told with where it stands."""
    try:
        return step()
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith((label, "--")) else f"{label}: {message}") from None
