"""What a run leaves to its plan."""

from pathlib import Path

import pytest
from rank_processes import run_ranks

from sparse_llama import cli


def test_every_rank_groups_heads_as_the_main_rank_has_planned():
    """Free memory differs between ranks; layers that differed would wait for each other for ever."""
    assert run_ranks(Path(__file__).with_name("settled_ranks.py"), 2) == [4, 4]


def test_a_probe_measures_one_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.main(cli.probe_memory, cli.probe_memory_parser("doc"), ["--head_groups", "auto"])
    assert ended.value.code == 2
    assert "give a number with --head_groups, 0 for none" in capsys.readouterr().err
