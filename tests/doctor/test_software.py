"""Versions against what this project asks for, and packages that are there and do not import."""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from sparse_llama.doctor import software
from sparse_llama.doctor.software import check_imports, check_requirement, check_torch, check_versions

ROOT = Path(__file__).parents[2]


def not_installed(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ("2.10.0", "ok"),
        ("2.13.0+cpu", "ok"),
        ("2.11.0a0+git1", "ok"),
        ("2.9.1", "fail"),
        ("2.10.0rc1", "fail"),
    ],
)
def test_a_version_is_judged_as_pip_does(monkeypatch, found: str, status: str):
    """By PEP 440: a local build is its version, a candidate of a version is not that version."""
    monkeypatch.setattr(software, "version", lambda name: found)
    row = check_requirement(Requirement("torch>=2.10"))
    assert row.status == status
    assert row.found.startswith(found)
    assert row.advice == ("" if status == "ok" else "pip install 'torch>=2.10'")


def test_what_is_missing_is_red_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr(software, "version", not_installed)
    row = check_requirement(Requirement("transformers>=5,<6"))
    assert (row.status, row.found) == ("fail", "not installed; asked for: <6,>=5")
    assert row.advice == "pip install 'transformers<6,>=5'"


def test_everything_that_the_project_asks_for_is_a_row():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    rows = {row.name: row for row in check_versions()}
    assert {Requirement(line).name for line in declared} <= set(rows)
    assert [row for row in rows.values() if row.status == "fail"] == []
    assert rows["python"].found == sys.version.split()[0]


def test_a_checkout_that_was_not_installed_is_told_and_still_checked(monkeypatch):
    def nothing(name: str):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(software, "requires", nothing)
    monkeypatch.setattr(software, "distribution", nothing)
    rows = {row.name: row for row in check_versions()}
    assert rows["sparse-llama"].status == "fail"
    assert "pip install -e ." in rows["sparse-llama"].advice
    assert rows["torch"].status == "ok"


def test_a_package_that_does_not_import_is_red(monkeypatch, tmp_path: Path):
    (tmp_path / "broken_package.py").write_text('raise ImportError("libcudart.so.12: cannot open")')
    (tmp_path / "needs_another.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("broken_package", "needs_another", "never_installed", "json")
    monkeypatch.setattr(software, "requirements", lambda: [Requirement(name) for name in names])
    rows = list(check_imports())
    assert [(row.name, row.status) for row in rows] == [("broken_package", "fail"), ("needs_another", "fail")]
    assert "ImportError: libcudart.so.12: cannot open" in rows[0].found
    assert rows[1].advice == "pip install no_such_package"


@pytest.mark.parametrize(
    ("cuda", "driver", "hidden", "status"),
    [
        (None, None, None, "ok"),
        (None, "580.65.06", None, "fail"),  # the CPU's build beside a GPU
        ("13.0", "470.10", None, "fail"),  # a driver that is too old for it
        ("13.0", "580.65.06", "", "warn"),
        ("13.0", None, None, "ok"),
    ],
)
def test_torchs_build_is_held_against_the_driver(monkeypatch, cuda, driver, hidden, status: str):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(software, "ask", lambda *command: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    row = check_torch()
    assert row.status == status
    assert bool(row.advice) == (status != "ok")
