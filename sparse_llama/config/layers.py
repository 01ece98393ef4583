"""Which layer attends by which layout: one for all, and the exceptions.

A few dense layers repair much of what sparse ones lose, so ``sparse_llama.attention`` names layers:

    "dense_layers": [0, 1, -1]
    "layouts": [{"layers": "8:16", "sparse_attention": {"mode": "fixed"}}]

Layers are numbers, negative ones counting from the last, or a slice as Python writes it ("::4").
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BeforeValidator

from sparse_llama.config.mask_file import pack_mask
from sparse_llama.config.neox import DENSE_TYPES, check_options, is_neox, neox_block, neox_types
from sparse_llama.config.section import Section, show
from sparse_llama.config.sparsity import MaskSparsity, Sparsity, parse_sparsity
from sparse_llama.errors import ConfigError


def _check_layers(value: object) -> object:
    if isinstance(value, list | tuple) and value and all(type(layer) is int for layer in value):
        return tuple(value)
    if isinstance(value, str) and _as_slice(value) is not None:
        return value
    raise ValueError(f'must be layer numbers or a slice such as "0:2" or "::4", got {show(value)}')


def _as_slice(text: str) -> slice | None:
    try:
        bounds = [int(part) if part.strip() else None for part in text.split(":")]
    except ValueError:
        return None
    return slice(*bounds) if len(bounds) in (2, 3) and bounds[2:] != [0] else None


Layers = Annotated[tuple[int, ...] | str, BeforeValidator(_check_layers)]
"""A choice of layers."""


class LayoutOfLayers(Section):
    """A layout for some layers."""

    layers: Layers
    sparse_attention: dict[str, Any]


@dataclass(frozen=True)
class LayerSparsities:
    """The layout of every layer of a model whose depth is not known yet."""

    default: Sparsity | None
    """None is full causal attention."""
    layouts: tuple[tuple[Layers, Sparsity], ...] = ()
    """Of these layers instead; the last that names a layer wins."""
    dense_layers: Layers | None = None
    """Full causal attention whatever else names them."""
    num_layers: int | None = None
    """Of the only models that this fits; None is any."""

    def resolve(self, num_layers: int) -> tuple[Sparsity | None, ...]:
        """Return the sparsity of each layer, None where attention is full.

        Raises:
            ConfigError: a layer is named that the model has not, or layers are missing.
        """
        if self.num_layers not in (None, num_layers):
            raise ConfigError(
                f"sparse_attention.attention_config: names {self.num_layers} layers, the model has "
                f'{num_layers}; name them all, or repeat a pattern with "all"'
            )
        found: list[Sparsity | None] = [self.default] * num_layers
        for index, (layers, sparsity) in enumerate(self.layouts):
            for layer in _numbers(layers, num_layers, f"sparse_llama.attention.layouts.{index}.layers"):
                found[layer] = sparsity
        if self.dense_layers is not None:
            for layer in _numbers(self.dense_layers, num_layers, "sparse_llama.attention.dense_layers"):
                found[layer] = None
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Return the arguments of ``layer_sparsities`` as JSON holds them, GPT-NeoX's block translated."""
        return {
            "sparse_attention": None if self.default is None else self.default.model_dump(mode="json"),
            "layouts": [
                {
                    "layers": layers if isinstance(layers, str) else list(layers),
                    "sparse_attention": sparsity.model_dump(mode="json"),
                }
                for layers, sparsity in self.layouts
            ],
            "dense_layers": list(self.dense_layers)
            if isinstance(self.dense_layers, tuple)
            else self.dense_layers,
        }

    def packed(self) -> "LayerSparsities":
        """Return the same with the tables of masks in place of their paths, for an adapter to keep.

        Raises:
            ConfigError: a mask's file is gone, or is none.
        """
        default = None if self.default is None else _packed(self.default)
        layouts = tuple((layers, _packed(sparsity)) for layers, sparsity in self.layouts)
        return replace(self, default=default, layouts=layouts)

    @property
    def distinct(self) -> tuple[Sparsity, ...]:
        """The layouts that layers may have."""
        every = (self.default, *(sparsity for _, sparsity in self.layouts))
        return tuple(dict.fromkeys(one for one in every if one is not None))

    @property
    def is_dense(self) -> bool:
        return not self.distinct

    @property
    def align(self) -> int:
        """Tokens that documents start at multiples of, so that blocks of every layer begin with them."""
        return math.lcm(*(sparsity.block for sparsity in self.distinct))

    def __str__(self) -> str:
        if self.is_dense:
            return "dense"
        text = "sparse, " + " and ".join(f"{one.mode}, block {one.block}" for one in self.distinct)
        return text if self.dense_layers is None else f"{text}, some layers dense"


def layer_sparsities(
    sparse_attention: dict[str, Any] | None,
    layouts: tuple[LayoutOfLayers, ...] = (),
    dense_layers: Layers | None = None,
) -> LayerSparsities:
    """Return what the ``sparse_attention`` block and the two keys of ``sparse_llama.attention`` say together.

    Raises:
        ConfigError: a block is none.
    """
    parsed = tuple(
        (one.layers, _parse(one.sparse_attention, f"sparse_llama.attention.layouts.{index}."))
        for index, one in enumerate(layouts)
    )
    if sparse_attention is not None and is_neox(sparse_attention):
        by_type, num_layers = _by_type(sparse_attention)
        return LayerSparsities(None, (*by_type, *parsed), dense_layers, num_layers)
    default = None if sparse_attention is None else parse_sparsity(sparse_attention)
    return LayerSparsities(default, parsed, dense_layers)


def _packed(sparsity: Sparsity) -> Sparsity:
    return pack_mask(sparsity) if isinstance(sparsity, MaskSparsity) else sparsity


def _parse(block: dict[str, Any], prefix: str) -> Sparsity:
    try:
        return parse_sparsity(block)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _by_type(block: Mapping[str, Any]) -> tuple[list[tuple[Layers, Sparsity]], int | None]:
    """Return which layers have which layout in GPT-NeoX's block, and of how many layers it speaks."""
    types, num_layers = neox_types(block)
    options = check_options(block.get("sparsity_config"))
    found: list[tuple[Layers, Sparsity]] = []
    for kind in dict.fromkeys(types):
        if kind in DENSE_TYPES:
            continue
        sparsity = _parse(neox_block(kind, options), "")
        places = [index for index, other in enumerate(types) if other == kind]
        if num_layers is None:
            found += [(f"{place}::{len(types)}", sparsity) for place in places]
        else:
            found.append((tuple(places), sparsity))
    return found, num_layers


def _numbers(layers: Layers, num_layers: int, key: str) -> Iterator[int]:
    if isinstance(layers, str):
        chosen = _as_slice(layers)
        assert chosen is not None, "checked when it was read"
        yield from range(num_layers)[chosen]
        return
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise ConfigError(
                f"{key}: there is no layer {layer} in a model of {num_layers}; use {-num_layers} to "
                f"{num_layers - 1}"
            )
        yield layer % num_layers
