"""Whatever happens in a check is a row, and the next check is done: real processes that hang and crash."""

import json
import os
import time
from pathlib import Path

import pytest

from sparse_llama.doctor import examine as examining
from sparse_llama.doctor import worker
from sparse_llama.doctor.checks import SECTIONS, Check, checks
from sparse_llama.doctor.commands import telling_line
from sparse_llama.doctor.examine import examine
from sparse_llama.doctor.findings import Finding

TESTS = Path(__file__).parents[1]


def look(
    monkeypatch: pytest.MonkeyPatch, *names: str, limit_s: float = 20
) -> tuple[list[Finding], list[str]]:
    """Return the rows of some of the odd worker's checks, and what was said meanwhile."""
    monkeypatch.setattr(examining, "_START_S", 0.0)
    said: list[str] = []
    found = examine(
        [Check(name, "section", limit_s) for name in names],
        {},
        began=lambda check: said.append(f"began {check.name}"),
        noted=said.append,
        environment={"PYTHONPATH": str(TESTS)},
        module="odd_worker",
    )
    return [row for _, rows in found for row in rows], said


def test_checks_that_behave_share_a_process(monkeypatch):
    rows, said = look(monkeypatch, "one", "talks", "two")
    assert [row.name for row in rows] == ["one", "talks", "two"]
    assert len({row.found for row in rows}) == 1
    assert said == ["began one", "began talks", "this takes a while", "began two"]


def test_a_crash_is_a_row_and_the_rest_is_looked_at(monkeypatch):
    rows, _ = look(monkeypatch, "one", "crashes", "two", "leaves", "three")
    assert [(row.name, row.status) for row in rows] == [
        ("one", "ok"),
        ("crashes", "fail"),
        ("two", "ok"),
        ("leaves", "fail"),
        ("three", "ok"),
    ]
    assert rows[1].found == "its process was ended by SIGSEGV; last words: about to crash"
    assert rows[3].found == "its process ended with status 7; last words: last words"
    assert len({row.found for row in rows if row.status == "ok"}) == 3


def test_a_hang_is_a_row_and_nothing_of_it_goes_on(monkeypatch):
    started = time.monotonic()
    rows, _ = look(monkeypatch, "hangs", "two", limit_s=1.0)
    assert time.monotonic() - started < 15
    assert [row.status for row in rows] == ["fail", "ok"]
    assert rows[0].found.startswith("no answer within 1 s; last words: started ")
    compiler = int(rows[0].found.rsplit(" ", 1)[1])
    deadline = time.monotonic() + 5
    while is_running(compiler) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(compiler)


def is_running(process: int) -> bool:
    """Return whether a process lives; one that was killed is a zombie until its new parent looks."""
    try:
        status = Path("/proc", str(process), "stat").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def test_after_a_check_that_raised_the_rest_is_done_elsewhere(monkeypatch):
    """It may have left a broken CUDA context behind, of which the next one would be accused."""
    rows, _ = look(monkeypatch, "one", "is the last", "two")
    assert [row.status for row in rows] == ["ok"] * 3
    assert rows[0].found == rows[1].found != rows[2].found


def test_a_module_that_does_not_even_start_is_a_row_for_each_check(monkeypatch):
    monkeypatch.setattr(examining, "_START_S", 0.0)
    two = [Check(name, "section", 20) for name in ("one", "two")]
    found = examine(two, {}, began=lambda check: None, noted=print, module="no_such_module")
    rows = [row for _, rows in found for row in rows]
    assert [row.status for row in rows] == ["fail", "fail"]
    assert "No module named no_such_module" in rows[0].found


def test_the_worker_makes_a_row_of_an_exception_and_ends(monkeypatch):
    def planted(name, options, tell):
        tell("looking")
        raise RuntimeError("first\nCUDA error: an illegal memory access")

    monkeypatch.setattr(worker, "find", planted)
    reading, writing = os.pipe()
    worker.main(writing, {}, ["devices", "memory"])
    with open(reading, encoding="utf-8") as channel:
        messages = [json.loads(line) for line in channel]
    assert messages[:2] == [{"begin": "devices"}, {"note": "looking"}]
    assert messages[2]["is_last"] is True
    (row,) = messages[2]["findings"]
    assert (row["status"], row["found"]) == ("fail", "RuntimeError: CUDA error: an illegal memory access")
    assert len(messages) == 3


@pytest.mark.parametrize("is_job", [False, True])
def test_every_section_has_its_checks_each_with_a_limit(is_job: bool):
    every = checks(is_job=is_job)
    assert {check.section for check in every} == set(SECTIONS)
    assert len({check.name for check in every}) == len(every)
    assert all(0 < check.limit_s <= 900 for check in every)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "a.cpp:1:10: fatal error: omp.h: No such file\nninja: build stopped",
            "a.cpp:1:10: fatal error: omp.h: No such file",
        ),
        (
            "Traceback (most recent call last):\n  raise\ntorch.distributed.DistNetworkError: timed out\n"
            "[2026-11-30 13:31:09,100] [ERROR] [launch.py:325:sigkill_handler] exits with return code = 1",
            "torch.distributed.DistNetworkError: timed out",
        ),
        ("hello\n\x1b[31mbye\x1b[0m\n\n", "bye"),
        ("[2026-11-30 13:31:09,100] [INFO] alone", "[2026-11-30 13:31:09,100] [INFO] alone"),
        ("", "no word"),
    ],
)
def test_the_line_that_says_most_is_found(text: str, line: str):
    assert telling_line(text) == line
