"""Whether an export computes what the adapted model computes, prefill and cached decoding.

The measure is the relative L2 distance of the logits to those of the adapted model in fp32. An fp32 export
may be 1e-5 away; a 16-bit one 1.5 times as far as the adapted model itself is when it runs in that type. One
model is in memory at a time.

``T`` tokens, ``V`` vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging

from sparse_llama.errors import ExportError
from sparse_llama.export.merged import MergedModel, layout_tensors
from sparse_llama.layouts import Layout
from sparse_llama.model.assemble import open_model

FP32_LIMIT = 1e-5
LOW_PRECISION_FACTOR = 1.5
_TOKENS = 96  # of the check without a layout
_DECODED = 12


@dataclass(frozen=True)
class Errors:
    """Relative L2 distances to the adapted model in fp32."""

    prefill: float
    decoding: float
    """Over the last tokens, computed with a cache."""

    def __str__(self) -> str:
        return f"{self.prefill:.1e} in prefill, {self.decoding:.1e} in decoding"


@dataclass(frozen=True)
class Reference:
    """What an export has to compute, and how far it may be from it."""

    tokens: torch.Tensor
    """(1, T) ids."""
    logits: torch.Tensor
    """(T, V) of the adapted model in fp32."""
    limits: Errors
    why: str

    def check(self, folder: Path, merged: MergedModel, dtype: torch.dtype) -> Errors:
        """Open the export in ``folder`` as its users will and return its errors.

        Raises:
            ExportError: it computes something else.
        """
        model = _open_export(folder, dtype, needs_code=merged.needs_code)
        _check_layouts(model, merged.layouts)
        errors = measure(model, self.tokens, self.logits)
        # "not <=": NaN is not greater than anything
        if not (errors.prefill <= self.limits.prefill and errors.decoding <= self.limits.decoding):
            raise ExportError(
                f"the exported model differs from the adapted one: relative error {errors} over "
                f"{self.tokens.shape[1]} tokens, allowed {self.limits} ({self.why}); nothing was written"
            )
        return errors


def make_reference(
    model: str, adapter: Path, *, revision: str | None, dtype: torch.dtype, layouts: Sequence[Layout]
) -> Reference:
    """Return the adapted model's logits, on tokens enough for each layout to hide some, and allowed errors.

    Raises:
        CheckpointError: the adapter is damaged or belongs to another base.
        ModelError: the base is missing or incomplete.
    """
    exact = open_model(model, adapter, revision=revision, dtype=torch.float32).model
    shortest = min((layout.num_tokens for layout in layouts), default=_TOKENS)
    num_tokens = min(shortest, max(_TOKENS, *(_num_tokens(layout) for layout in layouts), 0))
    tokens = _draw_tokens(exact.config.vocab_size, num_tokens)
    logits = _logits(exact, tokens)
    if dtype == torch.float32:
        return Reference(tokens, logits, Errors(FP32_LIMIT, FP32_LIMIT), "fp32 against fp32")
    del exact
    unmerged = measure(open_model(model, adapter, revision=revision, dtype=dtype).model, tokens, logits)
    limits = Errors(*(LOW_PRECISION_FACTOR * error for error in (unmerged.prefill, unmerged.decoding)))
    name = str(dtype).removeprefix("torch.")
    why = f"{LOW_PRECISION_FACTOR} times those of the adapted model in {name}"
    return Reference(tokens, logits, limits, why)


def measure(model: PreTrainedModel, tokens: torch.Tensor, logits: torch.Tensor) -> Errors:
    """Return how far ``model`` is from the (T, V) ``logits``."""
    decoded = _decode(model, tokens)
    return Errors(_distance(_logits(model, tokens), logits), _distance(decoded, logits[-len(decoded) :]))


def _num_tokens(layout: Layout) -> int:
    """Return twice the length from which on a layout hides something, so that most rows are affected."""
    causal, hiding = 1, layout.num_tokens  # a crop of a causal crop is causal: bisect
    while hiding - causal > 1:
        middle = (causal + hiding) // 2
        causal, hiding = (middle, hiding) if layout.is_causal_at(middle) else (causal, middle)
    return min(layout.num_tokens, 2 * hiding)


def _draw_tokens(vocab_size: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(20230428))


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits[0].float()


@torch.no_grad()
def _decode(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of the last tokens, computed one at a time, the last two together, with a cache."""
    num_decoded = min(_DECODED, tokens.shape[1] // 2)
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = DynamicCache(config=model.config)
    parts = []
    sizes = [tokens.shape[1] - num_decoded, *[1] * (num_decoded - 2), 2]
    for part in tokens.split(sizes, dim=1):
        parts.append(model(input_ids=part, use_cache=True, **{named: cache}).logits[0].float())
    return torch.cat(parts[1:])


def _distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return float((logits - reference).double().norm() / reference.double().norm())


def _open_export(folder: Path, dtype: torch.dtype, *, needs_code: bool) -> PreTrainedModel:
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The code in the folder, if any, is ours: this process has just written it.
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=needs_code).eval()
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def _check_layouts(model: PreTrainedModel, layouts: Sequence[Layout]) -> None:
    """The logits see the first blocks only; the tables are compared whole."""
    state = model.state_dict()
    for index, layout in enumerate(layouts):
        for name, table in layout_tensors(layout, index).items():
            if not torch.equal(state[name], table):
                raise ExportError(
                    f"{name} of the export is not that of the adapted model; nothing was written"
                )
