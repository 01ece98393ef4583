"""``launch/plan_memory.py`` as users start it: what it says, what it writes, and mistakes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rank_processes import process_environment

from sparse_llama import cli
from sparse_llama.config.run import Overrides, load_run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "plan_memory.py"
DEMO = ("--ds_config", str(ROOT / "ds_configs" / "cpu_demo.json"), "--micro_batch_size", "1")


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return what the command prints."""
    cli.main(cli.plan_memory, cli.plan_memory_parser("doc"), [str(argument) for argument in arguments])
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the line that refuses the arguments."""
    with pytest.raises(SystemExit) as ended:
        plan(capsys, *arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def rows(printed: str) -> dict[str, str]:
    """Return label and value of every line of two columns."""
    found: dict[str, str] = {}
    for line in printed.splitlines():
        label, _, value = line.strip().partition("  ")
        found.setdefault(label, value.strip())
    return found


@pytest.mark.slow
def test_the_demo_is_planned_for_this_machine_in_a_process_of_its_own(tmp_path: Path):
    """On a CPU build of PyTorch too, where a fake CUDA tensor would end the process."""
    file = tmp_path / "plan.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *DEMO, "--host_gib", "3", "--json", str(file)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=process_environment(CUDA_VISIBLE_DEVICES=""),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "fits: host" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["plan"]["fits"]
    assert written["hardware"]["gpu_bytes"] is None
    assert written["provenance"]["command"].endswith(f"--json {file}")
    components: dict[str, int] = written["plan"]["components_bytes"]["host"]
    assert sum(components.values()) == written["plan"]["needs_bytes"]["host"]


def test_a_gpu_that_is_not_there_is_planned_for(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file, png = tmp_path / "plan.json", tmp_path / "ladder.png"
    md = tmp_path / "plan.md"
    files = ("--json", file, "--png", png, "--md", md)
    printed = plan(capsys, *DEMO, "--gpu_gib", 1.6, "--host_gib", 8, *files)
    assert "fits: GPU" in printed
    assert "of 102.4 MiB" in printed, "1.5 GiB are left to CUDA"
    assert "a model of an A100, not measured" in printed
    written: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    reached = {one["name"]: one["num_tokens"] for one in written["ladder"]}
    names = (
        "nothing",
        "a checkpoint per layer",
        "+ tiled loss",
        "+ checkpoints on the host",
        "+ 4 head groups",
    )
    assert list(reached)[:3] == list(names)[:3]
    lengths = [reached[name] for name in names]
    assert lengths == sorted(set(lengths)), "every one of these reaches further"
    assert written["plan"]["longest"]["num_tokens"] > 512
    assert imread(png).shape[0] > 400
    page = md.read_text(encoding="utf-8")
    assert page.startswith("# Plan of cpu_demo\n\nComputed, not measured")
    for one in written["ladder"]:
        assert f"| {one['name']} | {one['num_tokens']:,} |" in page


@pytest.mark.slow
def test_the_longest_run_is_a_document_that_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "longest.json"
    asked = (*DEMO, "--gpu_gib", 1.6, "--host_gib", 4, "--longest", file)
    printed = plan(capsys, *asked)
    assert f"wrote {file}" in printed
    assert printed.rstrip().splitlines()[-1].startswith("fits: GPU")
    run = load_run(file, Overrides(output_dir=tmp_path / "out"), 1)
    assert run.settings.seq_length > 512
    assert run.checkpointing is not None
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["_made_by"].startswith("python launch/plan_memory.py")
    again = plan(capsys, *asked)
    assert f"wrote {file}" in again, "its own files it replaces"


def test_a_file_that_it_did_not_make_is_not_replaced(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    assert "exists and was not made by launch/plan_memory.py" in refusal(capsys, *DEMO, "--longest", mine)
    assert mine.read_text() == "{}"


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_would(capsys: pytest.CaptureFixture[str]):
    printed = plan(capsys, *DEMO, "--gpu_gib", 1.6, "--host_gib", 8, "--seq_length", 32768)
    assert "DOES NOT FIT: GPU" in printed
    assert "would fit" in printed


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "--gpu_gib: must be GiB above 0, got 0" in refusal(capsys, *DEMO, "--gpu_gib", 0)
    assert "--ranks: must be >= 1, got 0" in refusal(capsys, *DEMO, "--ranks", 0)
    assert "cannot be written" in refusal(capsys, *DEMO, "--png", tmp_path)
    assert "./nowhere: no such folder" in refusal(capsys, *DEMO, "--model", "./nowhere")


def test_help_names_every_flag_at_once():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    for flag in (
        "--gpu_gib",
        "--host_gib",
        "--longest",
        "--ladder",
        "--variants",
        "--json",
        "--png",
        "--ranks",
    ):
        assert flag in done.stdout
