"""What a machine has, as the kernel tells it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_llama.planning import hardware
from sparse_llama.planning.hardware import GIB, Hardware, available_host_bytes, this_machine


def test_a_gpu_leaves_a_reserve_to_cuda():
    machine = Hardware(40 * GIB, 96 * GIB)
    assert machine.usable_bytes("gpu") == int(38.5 * GIB)
    assert machine.usable_bytes("host") == 96 * GIB
    assert machine.usable_bytes("disk") is None
    assert machine.device == "cuda"


def test_a_machine_without_a_gpu_has_no_limit_of_one():
    machine = Hardware(None, 8 * GIB, disk_bytes=5)
    assert machine.device == "cpu"
    assert machine.usable_bytes("gpu") is None
    assert machine.usable_bytes("disk") == 5


def test_this_machine_is_told_by_the_kernel(tmp_path: Path):
    machine = this_machine(str(tmp_path / "not" / "yet"))
    page = os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine.host_bytes <= page * os.sysconf("SC_PHYS_PAGES")
    stats = os.statvfs(tmp_path)
    assert machine.disk_bytes == pytest.approx(stats.f_bavail * stats.f_frsize, rel=0.05)
    assert machine.is_this_machine
    assert this_machine().disk_bytes is None


@pytest.mark.parametrize(
    ("version", "files"),
    [
        ("2", {"memory.max": "{}", "memory.current": "{}", "memory.stat": "anon 5\ninactive_file {}\n"}),
        (
            "1",
            {
                "memory/memory.limit_in_bytes": "{}",
                "memory/memory.usage_in_bytes": "{}",
                "memory/memory.stat": "rss 5\ntotal_inactive_file {}\n",
            },
        ),
    ],
)
def test_a_containers_limit_counts_and_pages_that_would_be_dropped_do_not(
    version: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = (3 * GIB, 2 * GIB, GIB)
    for (name, text), value in zip(files.items(), values, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.format(value))
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    monkeypatch.setattr(hardware, "resident_bytes", lambda: 7)
    assert available_host_bytes() == 2 * GIB + 7


def test_no_limit_of_a_container_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    without = available_host_bytes()
    for name, text in (("memory.max", "max"), ("memory.current", "5"), ("memory.stat", "")):
        (tmp_path / name).write_text(text)
    assert available_host_bytes() == pytest.approx(without, rel=0.05)


def test_a_limit_on_the_process_counts():
    """``ulimit -d``: the allocator fails there."""
    source = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (6 * 2**30,) * 2);"
        "from sparse_llama.planning.hardware import available_host_bytes; print(available_host_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(6 * GIB, abs=GIB // 2)  # mapped files are resident, not private
