"""Whether an export computes what the adapted model computes, prefill and cached decoding.

The measure is the relative L2 distance of the logits to those of the adapted model in fp32, from which the
same parts are switched off that the export leaves out. An fp32 export may be 1e-5 away; a 16-bit one 1.5
times as far as that adapted model itself is when it runs in that type. One model is in memory at a time: the
export opens in a process of its own, with plain transformers.

``T`` tokens, ``V`` vocabulary.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_llama.distributed.ranks import device
from sparse_llama.errors import ExportError
from sparse_llama.export.fresh import measure_elsewhere
from sparse_llama.export.left_out import Parts, open_without
from sparse_llama.export.merged import MergedModel, layout_tensors
from sparse_llama.export.reopen import decode, logits_at, loss_sum, rotation
from sparse_llama.export.validation import HeldOut
from sparse_llama.layouts import Layout

FP32_LIMIT = 1e-5
LOW_PRECISION_FACTOR = 1.5
SPARSE_DENSITY = 0.5
_TOKENS = 96  # of the check without a layout
_DECODED = 12
_ROWS = 1024  # logits that are compared: with V = 128,000 half a gigabyte


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
    rows: torch.Tensor
    """Which tokens' logits are compared in prefill; the last ones are among them."""
    logits: torch.Tensor
    """(rows, V) of the adapted model in fp32."""
    rotation: torch.Tensor
    """Its turns per position, exact: what they do beyond the compared tokens no logit shows."""
    limits: Errors
    why: str
    density: float
    """Of the token pairs that the sparsest layout attends over, at this length; 1.0 without one."""

    def check(
        self, folder: Path, merged: MergedModel, dtype: torch.dtype, held_out: HeldOut | None = None
    ) -> tuple[Errors, float | None]:
        """Open the export in ``folder`` as its users will; return its errors, and its loss on ``held_out``.

        Raises:
            ExportError: it does not open, or computes something else.
        """
        num_decoded = torch.tensor(_num_decoded(self.tokens))
        job = {"tokens": self.tokens, "rows": self.rows, "num_decoded": num_decoded}
        options = {
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device()),
            "code": "yes" if merged.needs_code else "no",
        }
        found = measure_elsewhere(folder, job | ({} if held_out is None else held_out.job()), options)
        _check_layouts(found, merged.layouts)
        if not torch.equal(found["rotation"], self.rotation):
            raise ExportError(
                "the exported model turns positions otherwise than the adapted one; nothing was written"
            )
        errors = _errors(found["logits"], found["decoded"], self.logits)
        # "not <=": NaN is not greater than anything
        if not (errors.prefill <= self.limits.prefill and errors.decoding <= self.limits.decoding):
            raise ExportError(
                f"the exported model differs from the adapted one: relative error {errors} over "
                f"{self.tokens.shape[1]} tokens, allowed {self.limits} ({self.why}); nothing was written"
            )
        return errors, _mean(found["loss"]) if "loss" in found else None


def make_reference(
    base: Path, adapter: Path, *, left_out: Parts, dtype: torch.dtype, layouts: Sequence[Layout]
) -> Reference:
    """Return the adapted model's logits, on tokens enough for each layout to hide most, and allowed errors.

    Args:
        base: the folder of the base model.
        left_out: parts that the export does not have.
        layouts: the sparse ones that it has.

    Raises:
        CheckpointError: the adapter is damaged or belongs to another base.
        ModelError: the base is missing or incomplete.
    """
    exact = open_without(base, adapter, left_out, torch.float32).model
    shortest = min((layout.num_tokens for layout in layouts), default=exact.config.max_position_embeddings)
    num_tokens = min(shortest, max(_TOKENS, *map(_num_tokens, layouts), 0))
    tokens = _draw_tokens(exact.config.vocab_size, num_tokens)
    rows = torch.linspace(0, num_tokens - 1, min(num_tokens, _ROWS)).long()
    rows[-_num_decoded(tokens) :] = torch.arange(num_tokens - _num_decoded(tokens), num_tokens)
    logits, turns = logits_at(exact, tokens, rows), rotation(exact)
    density = min((layout.density_at(num_tokens) for layout in layouts), default=1.0)
    if dtype == torch.float32:
        limits, why = Errors(FP32_LIMIT, FP32_LIMIT), "fp32 against fp32"
        return Reference(tokens, rows, logits, turns, limits, why, density)
    del exact
    unmerged = open_without(base, adapter, left_out, dtype).model
    decoded = decode(unmerged, tokens, _num_decoded(tokens))
    errors = _errors(logits_at(unmerged, tokens, rows), decoded, logits)
    limits = Errors(*(LOW_PRECISION_FACTOR * error for error in (errors.prefill, errors.decoding)))
    name = str(dtype).removeprefix("torch.")
    why = f"{LOW_PRECISION_FACTOR} times those of the adapted model in {name}"
    return Reference(tokens, rows, logits, turns, limits, why, density)


def adapted_loss(base: Path, adapter: Path, left_out: Parts, dtype: torch.dtype, held_out: HeldOut) -> float:
    """Return the adapted model's loss without ``left_out``, in nats per labelled token."""
    model = open_without(base, adapter, left_out, dtype, device()).model
    total = loss_sum(model, held_out.ids, held_out.labels, held_out.lengths)
    if device().type == "cuda":
        del model
        torch.cuda.empty_cache()  # for the process that opens the export
    return _mean(total)


def _mean(total: torch.Tensor) -> float:
    return float(total[0] / total[1])


def _num_tokens(layout: Layout) -> int:
    """Return three times the length from which on a layout hides something, or what it takes until under half
    of the token pairs attend, as far as the layout goes."""
    whole = layout.num_tokens
    # a crop of a causal crop is causal: bisect
    hiding = bisect_left(range(whole), True, lo=1, key=lambda length: not layout.is_causal_at(length))
    length = min(whole, 3 * hiding)
    while layout.density < SPARSE_DENSITY <= layout.density_at(length) and length < whole:
        length = min(whole, length + max(layout.block, length // 16))
    return length


def _num_decoded(tokens: torch.Tensor) -> int:
    return min(_DECODED, tokens.shape[1] // 2)


def _draw_tokens(vocab_size: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(20230428))


def _errors(logits: torch.Tensor, decoded: torch.Tensor, reference: torch.Tensor) -> Errors:
    return Errors(_distance(logits, reference), _distance(decoded, reference[-len(decoded) :]))


def _distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return float((logits - reference).double().norm() / reference.double().norm())


def _check_layouts(found: dict[str, torch.Tensor], layouts: Sequence[Layout]) -> None:
    """The logits see the first blocks only; the tables are compared whole."""
    for index, layout in enumerate(layouts):
        for name, table in layout_tensors(layout, index).items():
            if not torch.equal(found[name], table):
                raise ExportError(
                    f"{name} of the export is not that of the adapted model; nothing was written"
                )
