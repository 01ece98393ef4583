"""The table of a study's runs while they go on."""

import json
from pathlib import Path

import pytest
from study.fabricated import fabricate, leave, measured, summary

from sparse_llama.study.live import LiveStudy
from sparse_llama.study.runs import StudyRun


def rows(printed: str) -> dict[str, list[str]]:
    """Return the words behind each run's name."""
    lines = [line.split() for line in printed.splitlines()]
    return {words[0]: words[1:] for words in lines if words and words[0][-6:-1] == "_seed"}


def test_what_each_run_is_doing_and_what_came_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = fabricate(tmp_path, seeds=[1, 2], compare=["equal_steps"])
    found = summary(train_loss=2.5, validation_loss=1.25)
    leave(study, StudyRun("dense", 128, 1), summary=found, measured=measured(0.5, 2.0, "a fox"))
    leave(study, StudyRun("sparse", 128, 1), status="out of memory", reason="9 GiB more asked for")
    running = study.folder_of(StudyRun("dense", 128, 2))
    running.mkdir(parents=True)
    step = {"step": 7, "loss": 3.5, "tokens_per_s": 1234.0, "peak_memory_bytes": 2**20, "elapsed_s": 61.0}
    (running / "metrics.jsonl").write_text(json.dumps(step) + "\n", encoding="utf-8")
    live = LiveStudy(study)
    live.begin("dense_128_seed2", "training")
    assert capsys.readouterr().out == "dense_128_seed2: training ...\n"
    live.show()
    printed = capsys.readouterr().out
    assert rows(printed) == {
        "dense_128_seed1": ["done", "10", "2.5000", "1.2500", "100", "1.0", "GiB", "1m", "00s"],
        "sparse_128_seed1": ["out", "of", "memory"],
        "dense_128_seed2": ["training", "7", "3.5000", "1,234", "1.0", "MiB", "1m", "01s"],
        "sparse_128_seed2": ["waiting"],
    }
    assert "dense_128_seed2: training, 0s" in printed
    live.end("done")
    assert capsys.readouterr().out == "dense_128_seed2: done, 0s\n"
    live.begin("base_128", "measuring")
    live.show()
    assert "base_128: measuring, 0s" in capsys.readouterr().out
