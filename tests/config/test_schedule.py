"""Schedules are counted in optimizer steps, from 1; where DeepSpeed's own differ, it is said how and why."""

import math
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules

from sparse_llama.config.optimizer import DEFAULT_LR, default_optimizer
from sparse_llama.config.schedule import Schedule, learning_rate, make_schedule, num_optimizer_steps
from sparse_llama.errors import ConfigError

PEAK = 3e-3


def deepspeeds(name: str, **params: Any) -> Any:
    """Return a function from DeepSpeed's ``last_batch_iteration`` to the learning rate of its scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = getattr(lr_schedules, name)(optimizer, **params)

    def rate(iteration: int) -> float:
        scheduler.step(iteration)
        return optimizer.param_groups[0]["lr"]

    return rate


def ours(block: dict[str, Any], steps: int) -> list[float]:
    """Return the learning rate of every step of a run, the first one at index 1."""
    schedule = make_schedule(block, lr=PEAK)
    assert schedule is not None
    resolved = schedule.resolve(steps)
    return [math.nan] + [learning_rate(resolved, step) for step in range(1, steps + 1)]


def test_a_run_of_13011_records_in_batches_of_64_for_3_epochs_has_609_steps():
    """Trap T4: 203 whole batches an epoch; a warm-up counted in micro-batches was 16 times too long."""
    assert num_optimizer_steps(13011, 4 * 16, 3) == 609
    assert num_optimizer_steps(64, 64, 1) == 1
    assert num_optimizer_steps(127, 64, 2) == 3
    assert num_optimizer_steps(5, 64, 1) == 1


KINDS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup_type", ["linear", "log"])
@pytest.mark.parametrize("steps", [1, 2, 3, 19, 20, 609])
def test_every_step_has_a_rate_above_zero_and_the_last_of_the_warm_up_has_the_peak(
    kind, warmup_type, steps: int
):
    """Trap T5. Five percent of the run, at least one step of it and never all of it, is the warm-up."""
    rates = ours({"type": kind, "params": {"warmup_type": warmup_type}}, steps)
    assert min(rates[1:]) > 0
    warmup = max(1, steps * 5 // 100)
    assert rates[warmup] == pytest.approx(PEAK, rel=1e-12)
    assert max(rates[1:]) <= PEAK * (1 + 1e-12)
    assert rates[1 : warmup + 1] == sorted(rates[1 : warmup + 1])


def test_a_warm_up_left_out_is_five_percent_of_the_run():
    assert make_schedule(None, lr=PEAK).resolve(609).warmup_steps == 30
    assert make_schedule(None, lr=PEAK).resolve(20).warmup_steps == 1
    short = {"type": "WarmupDecayLR", "params": {"total_num_steps": 40}}
    assert make_schedule(short, lr=PEAK).resolve(1000).warmup_steps == 2


@pytest.mark.parametrize("warmup", [1, 2, 7])
def test_warmup_lr_is_deepspeeds_one_iteration_on(warmup: int):
    """DeepSpeed's first step has iteration 0 and the rate 0. Ours has that of its iteration 1, so that step
    ``warmup_num_steps`` has the peak. DeepSpeed makes a warm-up of one step one of two."""
    theirs = deepspeeds("WarmupLR", warmup_min_lr=1e-4, warmup_num_steps=max(warmup, 2), warmup_type="linear")
    params = {"warmup_min_lr": 1e-4, "warmup_num_steps": warmup, "warmup_type": "linear"}
    rates = ours({"type": "WarmupLR", "params": params}, 20)
    assert deepspeeds("WarmupLR", warmup_num_steps=warmup)(0) == 0
    for step in range(1, 21) if warmup > 1 else range(2, 21):
        assert rates[step] == pytest.approx(theirs(step), rel=1e-12)
    assert rates[warmup] == pytest.approx(PEAK, rel=1e-12)


@pytest.mark.parametrize("warmup", [2, 7])
def test_a_logarithmic_warm_up_is_deepspeeds_of_one_step_more(warmup: int):
    """DeepSpeed: log(i + 1) / log(warmup), from 0 at i = 0; ours begins with its second value and ends at the
    peak as late, so both are moved on by one."""
    theirs = deepspeeds("WarmupLR", warmup_num_steps=warmup + 1, warmup_type="log")
    rates = ours({"type": "WarmupLR", "params": {"warmup_num_steps": warmup}}, 20)
    for step in range(1, 21):
        assert rates[step] == pytest.approx(theirs(step), rel=1e-12)


def test_warmup_decay_lr_is_deepspeeds_of_a_run_one_step_longer():
    """DeepSpeed's rate is 0 at iteration ``total_num_steps``; ours at the step after the last one."""
    theirs = deepspeeds(
        "WarmupDecayLR", total_num_steps=41, warmup_max_lr=PEAK, warmup_num_steps=5, warmup_type="linear"
    )
    params = {"total_num_steps": "auto", "warmup_num_steps": 5, "warmup_type": "linear"}
    rates = ours({"type": "WarmupDecayLR", "params": params}, 40)
    for step in range(1, 41):
        assert rates[step] == pytest.approx(theirs(step), rel=1e-12)
    assert theirs(41) == 0


def test_warmup_decay_lr_takes_its_peak_from_the_optimizer_where_deepspeed_takes_a_thousandth():
    default = deepspeeds("WarmupDecayLR", total_num_steps=40, warmup_num_steps=2)
    assert default(2) == pytest.approx(1e-3)
    assert max(ours({"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2}}, 40)[1:]) == PEAK


def test_warmup_cosine_lr_warms_up_one_iteration_on_and_falls_as_deepspeeds():
    """After the warm-up nothing is moved: DeepSpeed itself adds one there."""
    params = {
        "warmup_min_ratio": 0.1,
        "warmup_num_steps": 5,
        "cos_min_ratio": 0.05,
        "warmup_type": "linear",
        "total_num_steps": 40,
    }
    theirs = deepspeeds("WarmupCosineLR", **params)
    rates = ours({"type": "WarmupCosineLR", "params": params}, 40)
    for step in range(1, 41):
        iteration = step if step < 5 else step - 1
        expected = PEAK if step == 5 else theirs(iteration)
        assert rates[step] == pytest.approx(expected, rel=1e-12)
    assert rates[40] == pytest.approx(PEAK * 0.05, rel=1e-12)


def test_the_rate_stays_at_its_end_after_the_end_of_the_decay():
    cosine = {"type": "WarmupCosineLR", "params": {"total_num_steps": 10, "cos_min_ratio": 0.2}}
    assert ours(cosine, 15)[10:] == pytest.approx([PEAK * 0.2] * 6, rel=1e-12)
    linear = {"type": "WarmupDecayLR", "params": {"total_num_steps": 10, "warmup_min_lr": 1e-4}}
    assert ours(linear, 15)[11:] == pytest.approx([1e-4] * 5, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_up_as_long_as_the_run_is_refused(kind: str):
    """Trap T4: a warm-up that outlasts the run never reaches its peak."""
    for warmup in (20, 21, 1000):
        schedule = make_schedule({"type": kind, "params": {"warmup_num_steps": warmup}}, lr=PEAK)
        assert schedule is not None
        with pytest.raises(
            ConfigError, match=f"^scheduler.params.warmup_num_steps: {warmup} steps of warm-up"
        ):
            schedule.resolve(20)
        assert schedule.resolve(warmup + 1).warmup_steps == warmup


def test_a_warm_up_as_long_as_the_decay_is_refused():
    params = {"warmup_num_steps": 10, "total_num_steps": 10}
    schedule = make_schedule({"type": "WarmupDecayLR", "params": params}, lr=PEAK)
    assert schedule is not None
    with pytest.raises(ConfigError, match=r"but scheduler\.params\.total_num_steps is 10; use less than 10"):
        schedule.resolve(100)


def test_without_a_scheduler_block_the_rate_is_a_cosine_after_a_linear_warm_up():
    assert make_schedule(None, lr=PEAK) == Schedule(type="WarmupCosineLR", max_lr=PEAK, warmup_type="linear")


def test_schedulers_that_set_rates_of_their_own_are_left_to_deepspeed():
    cycle = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}}
    assert make_schedule(cycle, lr=PEAK) is None
    assert make_schedule({"type": "LRRangeTest"}, lr=PEAK) is None


def test_the_default_learning_rate_is_that_of_adapters_and_not_a_base_rate(load):
    """Trap T8: 9e-3 was the base rate of a batch of 256, multiplied by batch / 256 before use."""
    assert 1e-3 <= DEFAULT_LR <= 2e-3
    assert load({}).deepspeed["optimizer"]["params"]["lr"] == DEFAULT_LR
    assert load({"optimizer": {"type": "AdamW"}}).deepspeed["optimizer"]["params"]["lr"] == DEFAULT_LR


def test_the_default_optimizer_decays_weights_and_a_given_one_only_where_it_says_so(load):
    """Trap T7's default; that decay reaches prompts only is tested with the parameter groups."""
    assert default_optimizer()["params"]["weight_decay"] == 0.02
    assert "weight_decay" not in load({"optimizer": {"type": "AdamW"}}).deepspeed["optimizer"]["params"]
