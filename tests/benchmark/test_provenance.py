"""No result without where it comes from."""

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from sparse_llama.benchmark.provenance import clock_mhz, provenance

ROOT = Path(__file__).parents[2]


def test_it_says_command_commit_date_hardware_and_versions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    origin = provenance("launch/benchmark.py", ["attention", "--output_dir", "a folder"])
    assert origin.command == (
        "OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python launch/benchmark.py attention --output_dir 'a folder'"
    )
    then = datetime.strptime(origin.date, "%Y-%m-%d %H:%M UTC").replace(tzinfo=UTC)
    assert timedelta(0) <= datetime.now(UTC) - then < timedelta(minutes=3)
    assert origin.versions["torch"] == torch.__version__
    assert {"python", "sparse_llama", "triton"} <= set(origin.versions)
    assert f"{torch.get_num_threads()} of" in origin.hardware
    assert torch.backends.cpu.get_cpu_capability() in origin.hardware
    assert clock_mhz() is None


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
def test_the_commit_is_the_checkouts():
    asked = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    found = provenance("launch/benchmark.py", []).git_commit
    assert found is not None
    assert head.startswith(found.rstrip("+"))
