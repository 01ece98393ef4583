"""Devices, memory and folders: what is told of a machine that lacks something."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from sparse_llama.doctor import devices, memory
from sparse_llama.doctor.devices import check_devices, cpu_quota
from sparse_llama.doctor.memory import Folder, check_folder, check_memory

GIB = 2**30


def folder(path: Path, **changes: object) -> Folder:
    made = {"name": "runs/", "path": path, "needed_bytes": 1, "what": "results", "if_closed": "fail"}
    return Folder(**(made | {"elsewhere": "--output_dir DIR"} | changes))  # type: ignore[arg-type]


def test_this_machine_has_what_the_tests_need():
    rows = {row.name: row for row in (*check_devices(), *check_memory())}
    assert {"a run uses", "CPU", "cores", "host memory", "runs/", "temporary", "row cache"} <= set(rows)
    assert [row for row in rows.values() if row.status == "fail"] == []


def test_more_threads_than_cores_are_told_with_the_number_to_set(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(devices, "cpu_quota", lambda: None)
    assert {row.name: row.status for row in check_devices()}["cores"] == "ok"
    monkeypatch.setattr(devices, "cpu_quota", lambda: 2.0)
    row = {row.name: row for row in check_devices()}["cores"]
    assert row.status == "warn"
    assert row.advice.startswith("export OMP_NUM_THREADS=2:")


@pytest.mark.parametrize(("text", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5)])
def test_a_containers_share_of_the_cores_is_read(tmp_path: Path, text: str, quota: float | None):
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path / "cpu.max") == quota
    assert cpu_quota(tmp_path / "missing") is None


def test_a_folder_that_is_not_there_yet_is_judged_by_where_it_would_be_made(tmp_path: Path):
    row = check_folder(folder(tmp_path / "a" / "b"))
    assert row.status == "ok"
    assert str(tmp_path / "a" / "b") in row.found
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_with_how_to_name_another(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    for status in ("fail", "warn"):
        row = check_folder(folder(tmp_path / "file" / "runs", if_closed=status))
        assert row.status == status
        assert row.found.endswith("Not a directory")
        assert row.advice == "name another folder with --output_dir DIR"


def test_a_full_drive_is_told(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    row = check_folder(folder(tmp_path, needed_bytes=15 * GIB))
    assert row.status == "warn"
    assert row.advice.startswith("keep 15.0 GiB free, or name another folder")


@pytest.mark.parametrize(("available", "status"), [(1, "fail"), (4, "warn"), (40, "ok")])
def test_host_memory_is_held_against_what_runs_take(available: int, status: str):
    assert memory._host(available * GIB).status == status


def test_too_little_shared_memory_is_told_in_dockers_words(monkeypatch):
    """Docker gives 64 MiB, a rank of DeepSpeed's on a CPU takes 66."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**26, 0, 2**26))  # type: ignore[attr-defined]
    (row,) = memory._shared()
    assert row.status == "warn"
    assert "--shm-size" in row.advice
