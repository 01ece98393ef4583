"""The longest context that fits, and the settings that reach further.

The bytes at a peak are the maximum of affine functions of the row's length: a convex function, which the
chord between a length that fits and one that does not overestimates. The chord's own crossing of the budget
therefore fits, and the line through the two longest that fit crosses it at or beyond the answer: a few
estimates close in on it, where bisection would take one for every bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from transformers import LlamaConfig

from sparse_llama.config.run import Run
from sparse_llama.config.settings import MOST_TOKENS
from sparse_llama.planning.estimate import Estimate, Place, estimate
from sparse_llama.planning.hardware import Hardware
from sparse_llama.planning.roofline import plan_of

PLACES: tuple[Place, ...] = ("gpu", "host", "disk")
_STEP = 64  # tokens, and a multiple of the layout's block

Estimator = Callable[..., Estimate]


@dataclass(frozen=True)
class Longest:
    """The longest row that fits a run's settings."""

    num_tokens: int
    """0 where not even the shortest fits."""
    estimate: Estimate | None
    """At that length; None at 0."""
    binds: Place | None
    """Which place a longer row does not fit; None where the search ended at ``MOST_TOKENS``."""


@dataclass
class Planner:
    """Estimates of one base on one machine, each made once."""

    config: LlamaConfig
    hardware: Hardware
    ranks: int = 1
    """Processes of the run, all on this machine: each has a GPU, they share the host."""
    estimator: Estimator = estimate
    _made: dict[str, Estimate] = field(default_factory=dict, repr=False)

    def at(self, run: Run, num_tokens: int | None = None) -> Estimate:
        """Return the estimate of ``run`` at a length; None is its own."""
        run = run if num_tokens is None else at_length(run, num_tokens)
        key = repr((run.deepspeed, run.layouts, run.settings))
        if key not in self._made:
            self._made[key] = self.estimator(run, self.config, device=self.hardware.device, ranks=self.ranks)
        return self._made[key]

    def needs(self, made: Estimate) -> dict[Place, int]:
        """Return the bytes that the run needs of each place: of a GPU one rank's, of host and disk all
        ranks'."""
        peak = made.peak_bytes
        return {place: peak.get(place, 0) * (1 if place == "gpu" else self.ranks) for place in PLACES}

    def shares(self, made: Estimate) -> dict[Place, float]:
        """Return the need of each place over what is there; more than 1 does not fit."""
        shares: dict[Place, float] = {}
        for place, needed in self.needs(made).items():
            usable = self.hardware.usable_bytes(place)
            if usable is not None and needed > 0:
                shares[place] = needed / usable if usable > 0 else math.inf
        return shares

    def fits(self, made: Estimate) -> bool:
        """Return whether everything fits its place."""
        return max(self.shares(made).values(), default=0.0) <= 1

    def binds(self, made: Estimate) -> Place:
        """Return the place that is fullest."""
        shares = self.shares(made)
        return max(shares, key=lambda place: shares[place])

    def step(self, run: Run) -> int:
        """Return what lengths are multiples of: every layout's block, on every sequence-parallel rank."""
        return math.lcm(_STEP, run.layouts.align) * run.sequence_parallel_size

    def _most_tokens(self, run: Run) -> int:
        """Return where a search ends: a mask from a file is as large as it is."""
        return min(MOST_TOKENS, plan_of(run, self.config).max_tokens() or MOST_TOKENS)

    def longest(self, run: Run, *, start: int | None = None, precision: float = 0.0) -> Longest:
        """Return the longest row that fits, at multiples of ``step``.

        Args:
            start: where to look first; None is the run's own length.
            precision: stop when it is known to be within this share of the longest that fits; 0 is within a
                step.
        """
        step = self.step(run)
        memory = run.settings.memory
        tile = -(-max(memory.loss_tile or 0, memory.mlp_tile or 0, memory.norm_tile or 0) // step)
        tried: dict[int, dict[Place, float]] = {}
        low, end = 0, self._most_tokens(run) // step + 1  # in steps; low fits, high does not
        high = end
        guess = min(max((start or run.settings.seq_length) // step, 1), max(end - 1, 1))
        while True:
            shares = self.shares(self.at(run, guess * step))
            tried[guess] = shares
            if max(shares.values(), default=0.0) <= 1:
                low = max(low, guess)
            else:
                high = min(high, guess)
            bound = _bound(tried, low, high, tile) if precision > 0 else high
            if high - low <= 1 or bound - low <= precision * low:
                break
            guess = min(max(_next_guess(tried, low, high), low + 1), high - 1)
        last = tried.get(high) if high - low <= 1 else tried.get(low)
        last = None if low >= end - 1 else last
        binds = None if not last else max(last, key=lambda place: last[place])
        return Longest(low * step, self.at(run, low * step) if low else None, binds)


def at_length(run: Run, num_tokens: int) -> Run:
    """Return ``run`` with rows of ``num_tokens``; its layouts are of that length, or cropped from the longer
    ones that the run names."""
    attention = run.settings.attention
    master = max(attention.master_length or 0, num_tokens)
    attention = attention.model_copy(update={"master_length": master})
    settings = run.settings.model_copy(update={"seq_length": num_tokens, "attention": attention})
    return replace(run, settings=settings)


def _bound(tried: dict[int, dict[Place, float]], low: int, high: int, tile: int) -> int:
    """Return a length that the longest cannot exceed: a convex function lies above the line through two
    points, beyond them. Up to a whole tile it is not convex."""
    fitting = sorted(length for length in tried if tile < length <= low)
    if len(fitting) < 2:
        return high
    return min(high, max(_crossing(tried[low], tried[fitting[-2]], low, fitting[-2]), low))


def _next_guess(tried: dict[int, dict[Place, float]], low: int, high: int) -> int:
    """Return the length to try next: where the line through two tried ones reaches the budget.

    Alternates between the line through the two longest that fit and the chord across the budget, so that both
    ends close in; the middle where neither moves.
    """
    fitting = sorted(length for length in tried if length <= low)
    if not fitting:
        return _crossing(tried[high], None, high, 0) if high in tried else 2 * low
    if high not in tried:
        if len(fitting) == 1:
            return 2 * low if max(tried[low].values(), default=0.0) > 0.25 else 4 * low
        return min(max(_crossing(tried[low], tried[fitting[-2]], low, fitting[-2]), low + 1), 8 * low)
    chord = _crossing(tried[high], tried[low], high, low)
    if chord > low:
        return chord
    beyond = low + 1
    if len(fitting) > 1:
        beyond = _crossing(tried[low], tried[fitting[-2]], low, fitting[-2]) + 1
    return beyond if low < beyond < high else (low + high) // 2


def _crossing(
    upper: dict[Place, float], lower: dict[Place, float] | None, upper_at: int, lower_at: int
) -> int:
    """Return the whole length at or below which the line through two points reaches 1, of the place where
    that is first; with one point, the line through it and half of the budget at 0."""
    crossings: list[float] = []
    for place, share in upper.items():
        base = lower.get(place, 0.0) if lower is not None else min(0.5, share / 2)
        slope = (share - base) / (upper_at - lower_at)
        if slope > 0:
            crossings.append(upper_at + (1 - share) / slope)
    if not crossings or not math.isfinite(min(crossings)):
        return (upper_at + lower_at) // 2 if lower is not None or not crossings else upper_at // 2
    return math.floor(min(crossings))
