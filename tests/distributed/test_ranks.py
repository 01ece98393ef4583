"""What a process group leaves on the machine, and what its ranks find out about each other."""

from pathlib import Path
from typing import Any

import pytest
from rank_processes import run_ranks

from sparse_llama.distributed.agreement import check_agreement


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(Path(__file__).with_name("one_job.py"), 2)


def test_shared_memory_goes_with_its_processes(found: list[dict[str, Any]]):
    """DeepSpeed's keeps its name, and so its 66 MiB a process, until somebody deletes it."""
    assert [rank["sums"] for rank in found] == [[[3.0], []]] * 2


def test_every_rank_has_the_numbers_of_all(found: list[dict[str, Any]]):
    assert [rank["numbers"] for rank in found] == [[[0.5, 1.5], 7]] * 2


def test_ranks_that_differ_are_told_on_every_rank_what_in(found: list[dict[str, Any]]):
    """By a value, a bit of the data, or a shape: such jobs hang, or train what nobody has configured."""
    assert [rank["same"] for rank in found] == [None, None]
    for case, name in (("other value", "configuration"), ("other bit", "data"), ("other shape", "data")):
        for rank in found:
            assert rank[case].startswith(f"{name}: rank 1 and rank 0 differ; start all with the same"), case


def test_one_process_has_nobody_to_ask():
    def unread() -> dict[str, Any]:
        raise AssertionError("what is compared takes time to work out")

    check_agreement(unread)
