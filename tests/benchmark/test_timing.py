"""What is compared takes turns, and what is timed is the passes alone."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from sparse_llama.benchmark.timing import Contender, summarise, time_in_turns

CPU = torch.device("cpu")


def record(log: list[str], name: str, *, forward_s: float = 0.0, backward_s: float | None = 0.0) -> Contender:
    """Return a contender that takes at least the given seconds and writes down when it ran."""

    def forward() -> torch.Tensor:
        log.append(f"{name} forward")
        time.sleep(forward_s)
        return torch.tensor([len(log)])

    def backward(output: torch.Tensor) -> None:
        assert output.item() == len(log), "a backward pass of another forward pass"
        log.append(f"{name} backward")
        time.sleep(backward_s or 0.0)

    return Contender(name, forward, None if backward_s is None else backward)


def test_contenders_run_in_turns_and_never_twice_in_a_row():
    log: list[str] = []
    contenders = [record(log, name) for name in "ABC"]
    time_in_turns(contenders, CPU, repeats=4, warm_up_s=0)
    one_round = [f"{name} {which}" for name in "ABC" for which in ("forward", "backward")]
    assert log == one_round * (1 + 4)  # a round to warm up


def test_the_warm_up_lasts_as_long_as_asked_for():
    log: list[str] = []
    started = time.perf_counter()
    time_in_turns([record(log, "A", forward_s=0.01)], CPU, repeats=1, warm_up_s=0.1)
    assert time.perf_counter() - started >= 0.11
    assert log.count("A forward") > 3


def test_a_first_run_that_compiles_is_not_counted():
    is_first = True

    def forward() -> torch.Tensor:
        nonlocal is_first
        time.sleep(0.2 if is_first else 0.0)
        is_first = False
        return torch.zeros(1)

    times = time_in_turns([Contender("A", forward, None)], CPU, repeats=3, warm_up_s=0)
    assert times["A"]["forward"].upper_ms < 100


def test_passes_are_timed_apart_and_both_is_their_sum():
    contenders = [
        record([], "slow forward", forward_s=0.06, backward_s=0.02),
        record([], "slow backward", forward_s=0.02, backward_s=0.06),
    ]
    times = time_in_turns(contenders, CPU, repeats=3, warm_up_s=0)
    assert times["slow forward"]["forward"].median_ms >= 60
    assert 20 <= times["slow forward"]["backward"].median_ms < 50
    assert 20 <= times["slow backward"]["forward"].median_ms < 50
    assert times["slow backward"]["backward"].median_ms >= 60
    for one in times.values():
        assert one["both"].lower_ms >= 80


def test_without_a_backward_pass_there_is_a_forward_time_alone():
    times = time_in_turns([record([], "A", backward_s=None)], CPU, repeats=2, warm_up_s=0)
    assert set(times["A"]) == {"forward"}


def test_gradients_live_until_the_clock_has_stopped(monkeypatch: pytest.MonkeyPatch):
    """Giving memory back takes milliseconds that belong to no pass."""
    events: list[str] = []

    class Gradient:
        def __del__(self) -> None:
            events.append("freed")

    clock: Callable[[], float] = time.perf_counter

    def mark() -> float:
        events.append("mark")
        return clock()

    contender = Contender("A", lambda: torch.zeros(1), lambda output: Gradient())
    monkeypatch.setattr(time, "perf_counter", mark)
    time_in_turns([contender], CPU, repeats=1, warm_up_s=0)
    assert events[-4:] == ["mark", "mark", "mark", "freed"]


def test_medians_and_quartiles_are_those_of_numpy():
    samples = np.random.default_rng(0).normal(size=17).tolist()
    found = summarise(samples)
    lower, median, upper = np.quantile(samples, [0.25, 0.5, 0.75])
    assert (found.lower_ms, found.median_ms, found.upper_ms) == pytest.approx((lower, median, upper))
    assert summarise([3.0]).lower_ms == 3.0
