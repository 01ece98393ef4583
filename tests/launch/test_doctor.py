"""``launch/doctor.py`` as users start it: rows, a verdict, a status, files; with the launcher and without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rank_processes import launch, process_environment

from sparse_llama import cli
from sparse_llama.doctor import examine
from sparse_llama.doctor.findings import Finding

ROOT = Path(__file__).parents[2]


def start(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/doctor.py", *flags],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def plant(monkeypatch: pytest.MonkeyPatch, **rows: Finding) -> None:
    """Have checks find ``rows``, by their names, and everything else in order."""

    def look(checks, options, *, began, noted, environment):
        for check in checks:
            began(check)
            yield check, [rows.get(check.name, Finding(check.name, "ok", "in order"))]

    monkeypatch.setattr(examine, "examine", look)


def call(*flags: object) -> None:
    cli.main(cli.doctor, cli.doctor_parser("doc"), [str(flag) for flag in flags])


def test_a_sound_machine_ends_with_status_0_and_a_text_to_paste(monkeypatch, capsys, tmp_path: Path):
    plant(monkeypatch)
    call("--report", tmp_path / "a" / "doctor.txt", "--json", tmp_path / "doctor.json")
    printed = capsys.readouterr().out
    assert "\nThis machine can run sparse-llama.\n" in printed
    text = (tmp_path / "a" / "doctor.txt").read_text(encoding="utf-8")
    assert printed.endswith(f"For a bug report, from here:\n----\n{text}----\n")
    assert json.loads((tmp_path / "doctor.json").read_text(encoding="utf-8"))["is_bad"] is False


def test_a_broken_one_ends_with_status_1_after_it_has_said_everything(monkeypatch, capsys, tmp_path: Path):
    plant(monkeypatch, devices=Finding("GPU 0", "fail", "fell off the bus", "look at its power"))
    with pytest.raises(SystemExit) as ended:
        call("--report", tmp_path / "doctor.txt")
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "-> look at its power" in printed
    assert "FAIL  GPU 0" in (tmp_path / "doctor.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "gpus"], "--only: must be of software, devices, memory, ops, launcher, gradients"),
        (["--report", "."], "--report .: cannot be written"),
        (["--skip_build"], "--skip_build: unknown flag; did you mean '--skip_builds'?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, flags: list[str], message: str):
    with pytest.raises(SystemExit) as ended:
        call(*flags)
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


def test_the_script_looks_in_a_process_of_its_own():
    """Devices alone: what the others take is minutes, or the other tests'."""
    done = start("--only", "devices")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "a run uses" in done.stdout
    assert "Nothing is broken in what was looked at (devices)" in done.stdout


@pytest.mark.slow
def test_a_whole_look_finds_nothing_broken_here(tmp_path: Path):
    done = start("--json", str(tmp_path / "doctor.json"))
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "doctor.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for rows in found["sections"].values() for row in rows}
    assert rows["deepspeed, 1 process"]["status"] == "ok"
    assert rows["cpu_adam"]["status"] == "ok"
    assert rows["attention"]["status"] == rows["all of them, v2"]["status"] == "ok"


@pytest.mark.slow
def test_the_ranks_of_a_job_meet_and_the_main_one_speaks(tmp_path: Path):
    printed = launch(ROOT / "launch" / "doctor.py", 2, "--skip_builds", "--json", str(tmp_path / "a.json"))
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["sections"]["launcher"]
    assert [(row["name"], row["status"]) for row in rows] == [("this job, 2 ranks", "ok")]
    assert printed.count("For a bug report, from here:") == 1
    assert "rank 1" not in printed
