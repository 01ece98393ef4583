"""The launcher's check is red when processes do not start, do not end, or do not add up."""

import sys
import time

import pytest

from sparse_llama.doctor import launcher
from sparse_llama.doctor.launcher import check_launcher

WRONG = 'import sys, json; json.dump({"ranks": 2, "sum": %s}, open(sys.argv[-1], "w"))'


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch):
    """Return a function that checks a launcher of two processes which is this Python source."""
    monkeypatch.setattr(launcher, "places", lambda: 2)

    def start(source: str, limit_s: float = 20):
        monkeypatch.setattr(launcher, "launcher_command", lambda count: [sys.executable, "-c", source])
        return check_launcher(2, limit_s=limit_s)

    return start


def test_the_sum_is_that_of_the_ranks_numbers(start):
    assert start(WRONG % 3).status == "ok"
    row = start(WRONG % 2)
    assert (row.status, row.found) == ("fail", "their numbers add up to 2, not to 3")


def test_a_launcher_that_fails_is_red_with_the_line_that_says_why(start):
    row = start('import sys; print("hello"); print("error: no route to host"); print("bye"); sys.exit(3)')
    assert (row.status, row.found) == ("fail", "exit status 3: error: no route to host")


def test_one_that_leaves_no_result_is_red(start):
    assert start("pass").status == "fail"


def test_one_that_hangs_is_red_in_bounds(start):
    started = time.monotonic()
    row = start('import time; print("waiting for rank 1", flush=True); time.sleep(60)', limit_s=1)
    assert time.monotonic() - started < 10
    assert row.status == "fail"
    assert "waiting for rank 1" in row.found


def test_two_processes_are_not_asked_of_one_core(monkeypatch):
    monkeypatch.setattr(launcher, "places", lambda: 1)
    assert check_launcher(2).status == "none"


def test_without_the_command_it_is_red(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    row = check_launcher(1)
    assert row.status == "fail"
    assert "deepspeed" in row.found
