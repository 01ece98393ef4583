"""``launch/probe_memory.py`` as users start it: real steps in processes of their own, on the bundled
model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_processes import process_environment

from sparse_llama import cli
from sparse_llama.planning.probe import Outcome

ROOT = Path(__file__).parents[2]


def probe(output_dir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/probe_memory.py", "--output_dir", str(output_dir), *flags]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def cells(output_dir: Path) -> dict[tuple[int, str, int], dict]:
    found = json.loads((output_dir / "probe.json").read_text(encoding="utf-8"))["cells"]
    return {(one["zero_stage"], one["offload"], one["num_tokens"]): one for one in found}


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(cli.probe_memory, cli.probe_memory_parser("doc"), list(flags))
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--zero_stages", "0,4"),
            "--zero_stages: must be of 0, 1, 2, 3, with commas between them, got '0,4'",
        ),
        (("--offload", "gpu"), "--offload: must be of none, cpu, nvme"),
        (("--lengths", "512,-1"), "--lengths: must be whole numbers above 0"),
        (("--budget_gib", "0"), "--budget_gib: must be > 0, got 0.0"),
        (("--steps", "1"), "--steps: must be >= 2, as the first is not timed, got 1"),
        (("--ranks", "0"), "--ranks: must be >= 1, got 0"),
        (("--ds_config", "no.json"), "no.json: no such file"),
        (("--seq_length", "64"), "--seq_length: unknown flag"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
):
    line = refusal(capsys, *flags)
    assert said in line
    assert line.count("\n") == 1


def test_cells_are_measured_each_in_its_process_and_once(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Fits, out of memory and not applicable in one table; a second call has nothing left to do."""
    flags = ["--zero_stages", "0", "--offload", "none,cpu,nvme", "--lengths", "128,4096"]
    flags += ["--budget_gib", "0.2", "--no_plan"]
    done = probe(tmp_path, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    found = cells(tmp_path)
    assert {key: one["status"] for key, one in found.items()} == {
        (0, "none", 128): "fits",
        (0, "none", 4096): "out of memory",
        (0, "cpu", 128): "not applicable",
        (0, "cpu", 4096): "not applicable",
        (0, "nvme", 128): "not applicable",
        (0, "nvme", 4096): "not applicable",
    }
    figures = found[0, "none", 128]["figures"]
    assert 2 * 2**20 < figures["peak_tensor_bytes"] < 0.2 * 2**30
    assert figures["peak_host_bytes"] > figures["libraries_bytes"] > 2**28
    assert figures["step_s"] > 0
    assert "stage 0, offload none, 4,096: out of memory: in the forward pass of step 1" in done.stdout
    assert (tmp_path / "probe.png").stat().st_size > 10_000

    def start(*_: Any) -> Outcome:
        raise AssertionError("measured twice")

    monkeypatch.setattr("sparse_llama.planning.probe.measure", start)
    here = [*flags, "--output_dir", str(tmp_path)]
    cli.main(cli.probe_memory, cli.probe_memory_parser("doc"), here)
    assert "6 cells are there already" in capsys.readouterr().out
    assert cells(tmp_path) == found
    assert "of another run (other sparse_llama)" in refusal(capsys, *here, "--adapter", "v1")


@pytest.mark.slow
def test_the_longest_row_is_the_longest_in_runs_of_its_own(tmp_path: Path):
    """Where the search ends, a process of its own fits, and one a step longer does not."""
    budget = ["--budget_gib", "0.3", "--no_plan"]
    budget += ["--zero_stages", "2", "--offload", "none"]
    done = probe(tmp_path / "search", *budget, "--lengths", "256", "--longest")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "search" / "probe.json").read_text(encoding="utf-8"))
    (longest,) = record["longest"]
    fits = longest["num_tokens"]
    assert 256 <= fits < 4096
    step = max(16, fits // 16 // 16 * 16)
    tried = [fits - step, fits + 2 * step]  # a step of grace: what the C library keeps differs between runs
    done = probe(tmp_path / "apart", *budget, "--lengths", ",".join(map(str, tried)))
    found = {length: one["status"] for (_, _, length), one in cells(tmp_path / "apart").items()}
    assert found == {tried[0]: "fits", tried[1]: "out of memory"}, done.stdout


@pytest.mark.slow
def test_planned_and_measured_tensors_agree(tmp_path: Path):
    done = probe(tmp_path, "--zero_stages", "0,3", "--offload", "none,cpu", "--lengths", "1024")
    assert done.returncode == 0, done.stdout + done.stderr
    for key, one in cells(tmp_path).items():
        if one["status"] == "fits":
            assert one["planned_bytes"]["host"] == pytest.approx(
                one["figures"]["peak_tensor_bytes"], rel=0.05
            ), key
