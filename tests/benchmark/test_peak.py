"""The peak of memory that a call adds."""

import sys

import pytest
import torch

from sparse_llama.benchmark.peak import extra_bytes

MIB = 2**20
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is Linux'")


def fill(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.uint8)


def measure(call) -> float:
    found = extra_bytes(call, torch.device("cpu"))
    if found is None:
        pytest.skip("the kernel does not let a process reset its peak")
    return found / MIB


def test_what_a_call_frees_before_it_ends_is_in_its_peak():
    def call() -> torch.Tensor:
        fill(96 * MIB)
        return fill(32 * MIB)

    assert 95 < measure(call) < 110  # a page here and there is taken from what is resident


def test_memory_held_at_once_adds_up():
    def call() -> int:
        first, second = fill(64 * MIB), fill(64 * MIB)
        return int(first[0] + second[0])

    assert 127 < measure(call) < 142


def test_what_was_there_before_does_not_count():
    before = fill(256 * MIB)
    assert measure(lambda: before[0].clone()) < 8


def test_memory_that_an_earlier_call_gave_back_counts_anew():
    def call() -> list[torch.Tensor]:
        return [fill(MIB // 16) for _ in range(512)]  # small pieces, which the C library keeps when freed

    call()
    assert 31 < measure(call) < 42
