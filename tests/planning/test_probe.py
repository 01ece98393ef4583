"""A probe's search, its file and its refusals; what a cell measures is in tests/launch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_llama.config.run import Overrides
from sparse_llama.errors import ConfigError
from sparse_llama.planning import probe as probing
from sparse_llama.planning.probe import (
    CRASHED,
    FITS,
    NOT_APPLICABLE,
    OUT_OF_MEMORY,
    Cell,
    Figures,
    Outcome,
    Probe,
    launcher_command,
    measure,
)
from sparse_llama.planning.probe_report import panels, show_longest, show_probe
from sparse_llama.planning.probe_search import find_longest

FIGURES = Figures(0, 0, 700 * 2**20, 150 * 2**20, 500 * 2**20, 1.25)
FITTING = Outcome(FITS, figures=FIGURES, planned_bytes={"host": 140 * 2**20})
SHORT = Outcome(OUT_OF_MEMORY, "in the backward pass of step 1")


@pytest.mark.parametrize("start", [16, 512, 3000])
@pytest.mark.parametrize("limit", [15, 16, 100, 511, 512, 2049, 5000, 65_537])
def test_the_search_ends_within_a_sixteenth_of_the_longest_row(start: int, limit: int):
    tried: list[int] = []

    def try_length(length: int) -> Outcome:
        tried.append(length)
        return FITTING if length <= limit else SHORT

    bracket = find_longest(try_length, start, step=16)
    assert all(length % 16 == 0 for length in tried)
    assert len(tried) == len(set(tried)) <= 20
    assert bracket.fits <= limit
    assert bracket.fails is not None
    assert bracket.fails > limit
    assert bracket.fails - bracket.fits <= max(16, bracket.fits / 16)
    assert (bracket.fits == 0) == (limit < 16)


def test_a_crash_ends_the_search_and_is_not_taken_for_too_long_a_row():
    crash = Outcome(CRASHED, "ValueError: no")
    bracket = find_longest(lambda length: FITTING if length < 100 else crash, 32, step=16)
    assert (bracket.fits, bracket.fails, bracket.other) == (64, None, crash)


@pytest.fixture
def probe(tmp_path: Path) -> Probe:
    return Probe(config_path=None, overrides=Overrides(), output_dir=tmp_path, budget_bytes=2**30)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (Cell(0, "cpu", 64), "not at ZeRO stage 0"),
        (Cell(2, "nvme", 64), "not at ZeRO stage 2"),
        (Cell(3, "nvme", 64), "--nvme_path FOLDER"),
    ],
)
def test_a_stage_without_such_an_offload_is_not_applicable_and_starts_nothing(
    probe: Probe, cell: Cell, reason: str
):
    outcome = measure(probe, cell)
    assert outcome.status == NOT_APPLICABLE
    assert reason in outcome.reason
    assert "cpu_demo.json" not in outcome.reason
    assert not (probe.output_dir / "cells").exists()


def test_a_drive_without_libaio_is_not_applicable(probe: Probe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    on_drive = replace(probe, overrides=Overrides(nvme_path=probe.output_dir))
    outcome = measure(on_drive, Cell(3, "nvme", 64))
    assert outcome.status == NOT_APPLICABLE
    assert "libaio" in outcome.reason
    assert on_drive.run_of(Cell(1, "cpu", 64)).offload == "cpu", "the drive means nothing to other cells"


def test_rows_beyond_the_bases_positions_are_stretched(probe: Probe):
    probe.stretched_from = 2048
    assert probe.run_of(Cell(0, "none", 2048)).settings.model.rope_parameters is None
    assert probe.run_of(Cell(0, "none", 2064)).settings.model.rope_parameters is not None


def test_what_is_measured_is_there_for_the_next_call(probe: Probe, tmp_path: Path):
    assert probe.resume({"name": "a", "path": tmp_path}) == 0
    probe.keep(Cell(1, "cpu", 64), FITTING)
    probe.keep(Cell(1, "cpu", 128), SHORT)
    again = Probe(None, Overrides(), tmp_path, 2**30)
    assert again.resume({"name": "a", "path": tmp_path}) == 2
    assert again.outcomes == probe.outcomes


def test_another_runs_file_is_not_gone_on_with(probe: Probe, tmp_path: Path):
    probe.resume({"name": "a", "budget_bytes": 1})
    probe.keep(Cell(1, "cpu", 64), FITTING)
    again = Probe(None, Overrides(), tmp_path, 2**30)
    with pytest.raises(ConfigError, match=r"another run \(other budget_bytes\); start anew with --overwrite"):
        again.resume({"name": "a", "budget_bytes": 2})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": {}}'])
def test_a_damaged_file_is_refused(probe: Probe, text: str):
    probe.file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="no readable measurements"):
        probe.resume({})


def test_a_process_that_dies_is_an_outcome(probe: Probe, monkeypatch: pytest.MonkeyPatch):
    """Its last line tells; killed, it is what Linux does when memory runs out."""
    monkeypatch.setattr(probing, "_MEASURED", "sparse_llama.no_such_module")
    outcome = measure(probe, Cell(0, "none", 64))
    assert outcome.status == CRASHED
    assert "No module named sparse_llama.no_such_module" in outcome.reason
    kill = ["-c", "import sys; sys.exit(-9)"]  # as the launcher ends when its process was killed
    monkeypatch.setattr(probing, "launcher_command", lambda _: [launcher_command(1)[0], *kill])
    assert measure(probe, Cell(0, "none", 64)).status == OUT_OF_MEMORY


def test_the_processes_get_the_gpus_that_this_one_may_use(monkeypatch: pytest.MonkeyPatch):
    import base64

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    (world,) = (word for word in launcher_command(2) if word.startswith("--world_info="))
    found = json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info=")))
    assert found == {"localhost": [3, 5]}


def test_the_table_shows_every_outcome_and_why(probe: Probe, capsys: pytest.CaptureFixture[str]):
    probe.resume({})
    cells = [Cell(0, "none", 512), Cell(0, "none", 1024), Cell(0, "cpu", 512), Cell(1, "none", 512)]
    crash = Outcome(CRASHED, "ValueError: a mistake")
    refused = Outcome(NOT_APPLICABLE, "stage 0 cannot offload")
    for cell, outcome in zip(cells, [FITTING, SHORT, refused, crash], strict=True):
        probe.keep(cell, outcome)
    probe.longest[0, "none"] = 512
    show_probe(probe, cells)
    show_longest(probe, [(0, "none"), (1, "none")])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 120
    row = next(line for line in said.splitlines() if "fits" in line and "512" in line)
    assert " ".join(row.split()) == "0 none 512 fits 700.0 MiB 200.0 MiB 150.0 MiB 140.0 MiB 1.25 s"
    assert "stage 0, offload none, 1,024: out of memory: in the backward pass of step 1" in said
    assert "stage 0, offload cpu: not applicable: stage 0 cannot offload" in said
    assert "crashed: ValueError: a mistake" in said
    assert "1,024" in said.rsplit("longest row that fits", 1)[1]


def test_the_curves_are_of_what_fitted(probe: Probe):
    probe.resume({})
    cells = [Cell(0, "none", 512), Cell(0, "none", 1024), Cell(0, "none", 2048)]
    for cell, outcome in zip(cells, [FITTING, FITTING, SHORT], strict=True):
        probe.keep(cell, outcome)
    ((process, tensors, time),) = panels(probe, cells)
    assert process.level == 1.0
    assert process.curves[0].values == pytest.approx([200 / 1024] * 2)
    measured, planned = tensors.curves
    assert measured.lengths == [512, 1024]
    assert measured.values == pytest.approx([150 / 1024] * 2)
    assert planned.is_dashed
    assert planned.values == pytest.approx([140 / 1024] * 2)
    assert time.curves[0].values == [1.25, 1.25]
    assert panels(probe, cells[2:]) == []


def test_a_limit_of_the_process_makes_the_allocator_fail_and_is_never_raised(run_python):
    source = """
import resource, torch
from sparse_llama.training.host_memory import limit_private, private_bytes, private_limit_bytes
before = private_bytes()
limit_private(64 * 2**20)
first = private_limit_bytes()
assert abs(first - before - 64 * 2**20) < 2**20, (first, before)
limit_private(640 * 2**20)
assert private_limit_bytes() == first
torch.zeros(32 * 2**18)
try:
    torch.zeros(80 * 2**18)
except RuntimeError as error:
    print(error)
"""
    assert "you tried to allocate" in run_python(source)


def test_rows_of_a_cell_are_one_document_with_every_token_predicted():
    from sparse_llama.planning.probe_cell import _batch

    batch: Any = _batch(Probe(None, Overrides(), Path(), None).run_of(Cell(0, "none", 48)), 100, 0)
    assert batch.input_ids.shape == (4, 48)
    assert torch.equal(batch.position_ids, torch.arange(48).expand(4, 48))
    assert batch.num_labelled == 4 * 47
    assert torch.equal(batch.shift_labels[:, :-1], batch.input_ids[:, 1:])
