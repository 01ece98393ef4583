"""The table of faults counts every test once, also those of other processes, and hides no loss."""

from types import SimpleNamespace
from typing import Any

import pytest
from fault_table import FaultsRecord, count_faults


def report(when: str, *faults: tuple[str, int, int]) -> Any:
    """Return a test's report as pytest-xdist hands it over: properties are plain lists."""
    return SimpleNamespace(
        when=when, user_properties=[["faults", list(one)] for one in faults] + [["other", 1]]
    )


def test_counts_of_a_kind_are_summed_over_tests_and_told_by_their_calls_only():
    cut, flip = ("cut", 3, 3), ("flip", 5, 4)
    reports = [report("setup"), report("call", cut, flip), report("teardown", cut, flip), report("call", cut)]
    assert count_faults([*reports, SimpleNamespace(when="collect")]) == {"cut": (6, 6), "flip": (5, 4)}


def test_a_fault_that_is_lost_is_kept_by_its_kind(request: pytest.FixtureRequest):
    record = FaultsRecord(SimpleNamespace(user_properties=[]))  # type: ignore[arg-type]
    record("cut", injected=3, survived=3)
    record("flip", injected=5, survived=4)
    record("flip", injected=5, survived=2)
    assert record.lost == {"flip": 4}
    with pytest.raises(AssertionError):
        record("flip", injected=1, survived=2)
