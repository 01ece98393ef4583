"""What a process group leaves on the machine."""

from pathlib import Path

from rank_processes import run_ranks


def test_shared_memory_goes_with_its_processes():
    """DeepSpeed's keeps its name, and so its 66 MiB a process, until somebody deletes it."""
    assert run_ranks(Path(__file__).with_name("shared_memory.py"), 2) == [[[3.0], []]] * 2
