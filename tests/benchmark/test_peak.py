"""The peak of memory that a call adds."""

import mmap
import sys

import pytest
import torch

from sparse_llama.benchmark.peak import extra_bytes

MIB = 2**20
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is Linux'")


def fill(count: int) -> torch.Tensor:
    """Memory mapped for itself: the C library may serve even 96 MiB from what it kept of another test."""
    return torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8).fill_(1)


def fill_small() -> torch.Tensor:
    """64 KiB from the C library, which keeps them when they are freed."""
    return torch.ones(MIB // 16, dtype=torch.uint8)


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
        return [fill_small() for _ in range(512)]

    call()
    assert 31 < measure(call) < 42
