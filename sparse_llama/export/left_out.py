"""What an export is asked to do without, so that plain LLaMA can hold it, and the adapted model without it.

The adapted model is the judge of an export, so its parts are switched off where they act, in its parameters:
a gate of zero, a bias of zero, full attention. Nothing of the fold has a part in that.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from sparse_llama.adapters.weights import AdapterFile
from sparse_llama.errors import ExportError
from sparse_llama.layouts import Layout
from sparse_llama.model.assemble import OpenedModel, open_model

Part = Literal["prompt", "head_bias", "layout"]
Parts = frozenset[Part]
"""Of the three that plain LLaMA has no place for."""

_FLAGS: dict[Part, str] = {
    "prompt": "--drop_prompt",
    "head_bias": "--drop_head_bias",
    "layout": "--dense_attention",
}
_NAMES: dict[Part, str] = {
    "prompt": "the prompts",
    "head_bias": "the head's bias",
    "layout": "the sparse layout",
}
_GATE, _HEAD_BIAS = ".zero_init.gate", "lm_head.adapter_bias"


def flags_of(parts: Parts) -> list[str]:
    """Return the flags that leave ``parts`` out."""
    return [_FLAGS[part] for part in get_args(Part) if part in parts]


def describe(parts: Parts) -> str:
    """Return ``parts`` in words."""
    names = [_NAMES[part] for part in get_args(Part) if part in parts]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def find_parts(tensors: dict[str, torch.Tensor], layouts: Sequence[Layout]) -> Parts:
    """Return which of the parts a trained adapter has; a gate or a bias of zero is none.

    Args:
        layouts: the sparse ones.
    """

    def acts(ending: str) -> bool:
        return any(name.endswith(ending) and bool((tensor != 0).any()) for name, tensor in tensors.items())

    there: dict[Part, bool] = {
        "prompt": acts(_GATE),
        "head_bias": acts(_HEAD_BIAS),
        "layout": bool(layouts),
    }
    return frozenset(part for part, is_there in there.items() if is_there)


def check_asked(asked: Collection[Part], found: Parts, file: AdapterFile) -> tuple[str, ...]:
    """Return a line for everything that is to be left out and is not there.

    Raises:
        ExportError: nothing would be left of the adapter, or full attention is asked for where it is already.
    """
    if "prompt" in asked and file.adapter.version == "v1":
        raise ExportError(
            "--drop_prompt: a v1 adapter is its prompts, and without them the export would be the base; "
            "leave the flag out"
        )
    if "layout" in asked and file.layouts.is_dense:
        raise ExportError(
            "--dense_attention: the adapter was trained with dense attention, there is no layout to leave "
            "out; leave the flag out"
        )
    why: dict[Part, str] = {
        "prompt": "every gate is zero",
        "head_bias": "the head has no bias",
        "layout": "the layout hides nothing from sequences of the run's length",
    }
    return tuple(
        f"{_FLAGS[part]}: {why[part]}; nothing to leave out"
        for part in get_args(Part)
        if part in asked and part not in found
    )


def open_without(
    base: Path, adapter: Path, left_out: Parts, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> OpenedModel:
    """Return the adapted model in ``dtype`` with ``left_out`` switched off."""
    opened = open_model(str(base), adapter, dtype=dtype, device=device, dense_attention="layout" in left_out)
    endings = (_GATE,) * ("prompt" in left_out) + (_HEAD_BIAS,) * ("head_bias" in left_out)
    with torch.no_grad():
        for name, parameter in opened.model.named_parameters():
            if name.endswith(endings):
                parameter.zero_()
    return opened
