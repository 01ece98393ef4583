"""Learning-rate schedules, counted in optimizer steps from 1, and the ``scheduler`` block that asks for them.

The shapes are those of DeepSpeed's ``WarmupLR``, ``WarmupDecayLR`` and ``WarmupCosineLR``
(``runtime/lr_schedules.py``, 0.19.8), with the traps taken out:

* step 1 has a learning rate above 0 (DeepSpeed counts from 0, so its first step changes nothing);
* step ``warmup_num_steps`` has exactly the peak, and a warm-up as long as the run is refused;
* ``WarmupDecayLR`` reaches 0 one step after the last, so that no step is wasted;
* ``warmup_max_lr`` left out is the optimizer's ``lr`` in ``WarmupDecayLR`` too (DeepSpeed: 0.001, whatever
  the optimizer's);
* ``warmup_num_steps`` left out is 5% of the run (DeepSpeed: 1000 steps, longer than many a run).

``OneCycle`` and ``LRRangeTest`` set learning rates of their own and are DeepSpeed's to run.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from sparse_llama.config.section import Section, either, quote, suggest
from sparse_llama.errors import ConfigError

AUTO = "auto"
DEFAULT_WARMUP_SHARE = 20  # one step in 20, 5%
WarmupType = Literal["log", "linear"]
StepsOrAuto = Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], either('an integer >= 1 or "auto"')]
RateOrAuto = Annotated[
    Literal["auto"] | Annotated[float, Field(gt=0)] | None, either('a number > 0 or "auto"')
]


@dataclass(frozen=True)
class Schedule:
    """A learning rate for every step; ``resolve`` fills in what depends on the length of the run."""

    type: Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]
    max_lr: float
    min_lr: float = 0.0
    """Where the warm-up starts from, and what ``WarmupDecayLR`` falls to."""
    warmup_steps: int | None = None
    """Steps to the peak; None is 5% of the run, at least one step if the run has two."""
    total_steps: int | None = None
    """Steps until the end of the decay; None is the length of the run."""
    warmup_type: WarmupType = "linear"
    cos_min_ratio: float = 1e-4
    """What ``WarmupCosineLR`` ends at, as a share of the peak."""

    def resolve(self, total_steps: int) -> "Schedule":
        """Return the schedule of a run of ``total_steps``.

        Raises:
            ConfigError: the warm-up is as long as the run or longer, so that the peak would not be passed.
        """
        assert total_steps >= 1
        total = self.total_steps or total_steps
        shortest = min(total, total_steps)
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(max(1, shortest // DEFAULT_WARMUP_SHARE), shortest - 1)
        elif warmup >= shortest:
            what = "the run has" if shortest == total_steps else "scheduler.params.total_num_steps is"
            raise ConfigError(
                f"scheduler.params.warmup_num_steps: {warmup} steps of warm-up, but {what} {shortest}; "
                f"use less than {shortest}, or leave the key out for 5%"
            )
        return replace(self, warmup_steps=warmup, total_steps=total)


def learning_rate(schedule: Schedule, step: int) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 1, of a resolved schedule."""
    assert step >= 1
    assert schedule.warmup_steps is not None, "resolve the schedule first"
    assert schedule.total_steps is not None, "resolve the schedule first"
    warmup, total = schedule.warmup_steps, schedule.total_steps
    rise = schedule.max_lr - schedule.min_lr
    if step <= warmup:
        linear = step / warmup
        # log: DeepSpeed's log(step) / log(warmup) with both moved on by one, so that step 1 is not log(1) = 0
        share = linear if schedule.warmup_type == "linear" else math.log(step + 1) / math.log(warmup + 1)
        return schedule.min_lr + rise * share
    peak_step = max(warmup, 1)  # without a warm-up, which only a run of one step has, step 1 is the peak
    if schedule.type == "WarmupDecayLR":
        return schedule.min_lr + rise * max(0.0, (total + 1 - step) / (total + 1 - peak_step))
    if schedule.type == "WarmupCosineLR":
        progress = min(1.0, (step - peak_step) / max(1, total - peak_step))
        share = (1 + math.cos(math.pi * progress)) / 2
        return schedule.max_lr * (schedule.cos_min_ratio + (1 - schedule.cos_min_ratio) * share)
    return schedule.max_lr


def num_optimizer_steps(num_rows: int, global_batch: int, epochs: int) -> int:
    """Return the optimizer steps of ``epochs`` passes over ``num_rows`` rows, ``global_batch`` rows a step.

    Epochs follow one another without a gap: a step may take the last rows of one and the first of the next,
    and only what does not fill the very last step is left out. 13,011 rows in steps of 4 x 16 for 3 epochs:
    39,033 // 64 = 609. At least 1, whose rows then repeat.
    """
    return max(1, num_rows * epochs // global_batch)


class _Warmup(Section):
    warmup_num_steps: int | None = Field(default=None, ge=1)
    warmup_type: WarmupType = "log"


class WarmupLR(_Warmup):
    """``WarmupLR``: rise to the peak, then stay."""

    warmup_min_lr: float = Field(default=0.0, ge=0)
    warmup_max_lr: RateOrAuto = None


class WarmupDecayLR(WarmupLR):
    """``WarmupDecayLR``: rise, then fall linearly."""

    total_num_steps: StepsOrAuto = AUTO


class WarmupCosineLR(_Warmup):
    """``WarmupCosineLR``: rise, then fall along half a cosine."""

    total_num_steps: StepsOrAuto = AUTO
    warmup_min_ratio: float = Field(default=0.0, ge=0, le=1)
    cos_min_ratio: float = Field(default=1e-4, ge=0, le=1)


class OneCycle(Section):
    """``OneCycle``, DeepSpeed's own."""

    cycle_min_lr: float = Field(gt=0)
    cycle_max_lr: float = Field(gt=0)
    decay_lr_rate: float = Field(default=0.0, ge=0)
    cycle_first_step_size: int = Field(default=2000, ge=1)
    cycle_second_step_size: int | None = Field(default=None, ge=1)
    cycle_first_stair_count: int = Field(default=0, ge=0)
    cycle_second_stair_count: int | None = Field(default=None, ge=0)
    decay_step_size: int = Field(default=0, ge=0)
    cycle_momentum: bool = True
    cycle_min_mom: float = Field(default=0.8, ge=0, lt=1)
    cycle_max_mom: float = Field(default=0.9, ge=0, lt=1)
    decay_mom_rate: float = Field(default=0.0, ge=0)


class LRRangeTest(Section):
    """``LRRangeTest``, DeepSpeed's own."""

    lr_range_test_min_lr: float = Field(default=1e-3, gt=0)
    lr_range_test_step_size: int = Field(default=2000, ge=1)
    lr_range_test_step_rate: float = Field(default=1.0, ge=0)
    lr_range_test_staircase: bool = False


class Scheduler(Section):
    """The ``scheduler`` block."""

    type: str
    params: dict[str, object] = {}


SCHEDULERS: dict[str, type[Section]] = {
    cls.__name__: cls for cls in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
}


def parse_scheduler(block: object) -> tuple[str, Section]:
    """Return the type and the parameters of a ``scheduler`` block.

    Raises:
        ConfigError: an unknown type or parameter, or a value out of range.
    """
    scheduler = Scheduler.parse(block, "scheduler")
    if scheduler.type not in SCHEDULERS:
        raise ConfigError(
            f"scheduler.type: no scheduler is called {quote(scheduler.type)}"
            f"{suggest(scheduler.type, SCHEDULERS)}"
        )
    return scheduler.type, SCHEDULERS[scheduler.type].parse(scheduler.params, "scheduler.params")


def make_schedule(block: dict[str, Any] | None, lr: float) -> Schedule | None:
    """Return the schedule that a checked ``scheduler`` block asks for; None where DeepSpeed runs it.

    Args:
        block: None is a cosine over the whole run after a linear warm-up of 5%.
        lr: the optimizer's, which is the peak unless the block names another.
    """
    if block is None:
        return Schedule(type="WarmupCosineLR", max_lr=lr)
    kind, params = parse_scheduler(block)
    if isinstance(params, WarmupCosineLR):
        return Schedule(
            type="WarmupCosineLR",
            max_lr=lr,
            min_lr=lr * params.warmup_min_ratio,
            warmup_steps=params.warmup_num_steps,
            total_steps=None if params.total_num_steps == AUTO else params.total_num_steps,
            warmup_type=params.warmup_type,
            cos_min_ratio=params.cos_min_ratio,
        )
    if isinstance(params, WarmupLR):
        peak = lr if params.warmup_max_lr in (AUTO, None) else params.warmup_max_lr
        if params.warmup_min_lr > peak:
            raise ConfigError(
                f"scheduler.params.warmup_min_lr: {params.warmup_min_lr} is above the peak, {peak}; the "
                "warm-up would fall"
            )
        total = params.total_num_steps if isinstance(params, WarmupDecayLR) else AUTO
        return Schedule(
            type="WarmupDecayLR" if kind == "WarmupDecayLR" else "WarmupLR",
            max_lr=peak,
            min_lr=params.warmup_min_lr,
            warmup_steps=params.warmup_num_steps,
            total_steps=None if total == AUTO else total,
            warmup_type=params.warmup_type,
        )
    return None
