"""Checkpoints of whole runs: which is found, kept, refused, and what a failed save leaves."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import losses

from sparse_llama.config.run import Overrides, load_run
from sparse_llama.errors import CheckpointError, ConfigError
from sparse_llama.training import checkpoint, loop
from sparse_llama.training.checkpoint import LATEST, Position, find_checkpoint, list_checkpoints, set_aside
from sparse_llama.training.durable import find_damage
from sparse_llama.training.output import OutputFolder

Train = Callable[..., Path]
SAVING = {"sparse_llama": {"training": {"samples": 0, "save_every": 2, "keep_last": 3}}}


@pytest.fixture
def saved(plain_run: Train, tmp_path: Path) -> Path:
    """A finished run of 6 steps with checkpoints at 2, 4 and 6; a copy, to be damaged."""
    return shutil.copytree(plain_run(**SAVING), tmp_path / "run")


def names(output_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(output_dir / "checkpoints")]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_every_checkpoint_is_whole_and_the_newest_is_named(saved: Path):
    folder = saved / "checkpoints"
    assert names(saved) == ["step_000002", "step_000004", "step_000006"]
    assert [find_damage(folder / name) for name in names(saved)] == [None] * 3
    assert (folder / LATEST).read_text(encoding="utf-8").strip() == "step_000006"
    assert sorted(path.name for path in folder.iterdir()) == [LATEST, *names(saved)]
    kinds = {path.suffix for name in names(saved) for path in (folder / name).iterdir()}
    assert kinds == {".json", ".safetensors"}, "no pickle"


def test_a_damaged_checkpoint_is_passed_over_and_both_are_named(saved: Path):
    folder = saved / "checkpoints"
    flip(folder / "step_000006" / "optimizer.safetensors")
    (folder / "step_000004" / "adapter.safetensors").unlink()
    found, notes = find_checkpoint(folder, "auto")
    assert found == folder / "step_000002"
    assert notes == (
        f"{folder / 'step_000006'}: optimizer.safetensors has another SHA-256 than when it was saved; "
        "going on from step_000002",
        f"{folder / 'step_000004'}: adapter.safetensors is missing; going on from step_000002",
    )


def test_a_damaged_checkpoint_that_was_asked_for_is_refused_and_a_whole_one_named(saved: Path):
    folder = saved / "checkpoints"
    flip(folder / "step_000006" / "state.json")
    with pytest.raises(
        CheckpointError, match=r"state.json has another SHA-256 .* newest whole one is .*step_000004"
    ):
        find_checkpoint(folder, folder / "step_000006")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint there \(manifest.json is missing\)"):
        find_checkpoint(folder, saved / "adapter")


def test_without_a_whole_checkpoint_the_run_is_refused_before_anything_is_loaded(
    train: Train, saved: Path, capsys: pytest.CaptureFixture[str]
):
    for name in names(saved):
        flip(saved / "checkpoints" / name / "manifest.json")
    with pytest.raises(CheckpointError, match=r"--resume: no whole checkpoint under .*step_000006: manifest"):
        train("run", flags={"resume": "auto"}, **SAVING)
    assert "reading" not in capsys.readouterr().out


def test_a_run_goes_on_from_the_newest_whole_checkpoint_as_if_nothing_had_happened(
    train: Train, saved: Path, capsys: pytest.CaptureFixture[str]
):
    expected, tensors = losses(saved), load_file(saved / "adapter" / "adapter.safetensors")
    folder = saved / "checkpoints"
    flip(folder / "step_000006" / "adapter.safetensors")
    shutil.rmtree(saved / "adapter")
    with (saved / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 7, "lo')  # killed while it wrote
    train("run", flags={"resume": "auto"}, **SAVING)
    said = " ".join(capsys.readouterr().out.split())
    assert "step_000006: adapter.safetensors has another SHA-256" in said
    assert "resuming from" in said
    assert losses(saved) == expected
    again = load_file(saved / "adapter" / "adapter.safetensors")
    assert all(tensors[name].equal(again[name]) for name in tensors)
    assert [path.name for path in (folder / "set_aside_1").iterdir()] == ["step_000006"]
    assert [find_damage(folder / name) for name in names(saved)] == [None] * 3


def test_an_older_checkpoint_resumed_from_becomes_the_newest(saved: Path):
    """What came after it is another future of the run: a bare --resume must not find it."""
    folder = saved / "checkpoints"
    aside = set_aside(folder, Position(step=2), folder / "step_000002")
    assert aside is not None
    assert sorted(path.name for path in aside.iterdir()) == ["step_000004", "step_000006"]
    assert find_checkpoint(folder, "auto") == (folder / "step_000002", ())
    assert (folder / LATEST).read_text(encoding="utf-8").strip() == "step_000002"


@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.faults)])
def test_a_save_that_fails_is_said_and_the_run_goes_on(
    train: Train,
    plain_run: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    number: int,
):
    """There may be room again at the next save."""
    calls = [0]
    whole = checkpoint.save_file

    def fail_once(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(number, "No space left on device")
        whole(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", fail_once)
    run = train("run", **SAVING)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "step_000004: cannot be written (No space left on device); the newest checkpoint is step_000002"
        in said
    )
    assert names(run) == ["step_000002", "step_000006"]
    assert losses(run) == losses(plain_run(**SAVING))
    assert not [path for path in (run / "checkpoints").iterdir() if "unfinished" in path.name]


@pytest.mark.faults
def test_a_last_save_that_fails_ends_the_run_with_what_there_is(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    whole = checkpoint.publish

    def fail_last(unfinished: Path, target: Path) -> None:
        if target.name == "step_000006":
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(unfinished, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish", fail_last)
        with pytest.raises(
            CheckpointError, match=r"step_000006: cannot be written \(No space left on device\)"
        ):
            train("run", **SAVING)
    assert names(tmp_path / "run") == ["step_000002", "step_000004"]
    train("run", flags={"resume": "auto"}, **SAVING)
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_save_that_is_not_what_was_written_is_not_announced(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Nine public programs have saved empty tensors under ZeRO-3, without an error."""
    whole = checkpoint.write_adapter_folder

    def empty(folder: Path, tensors: dict[str, torch.Tensor], config: Any) -> None:
        whole(folder, {name: tensor[:0] for name, tensor in tensors.items()}, config)

    monkeypatch.setattr(checkpoint, "write_adapter_folder", empty)
    with pytest.raises(
        CheckpointError, match=r"step_000006: cannot be written \(\S+ was written as \(0,.*\), and is \("
    ):
        train("run", sparse_llama={"training": {"samples": 0}})
    assert names(tmp_path / "run") == []


@pytest.mark.faults
def test_a_flipped_bit_between_writing_and_reading_back_is_noticed(
    train: Train, monkeypatch: pytest.MonkeyPatch
):
    whole = checkpoint.save_file

    def flipped(tensors: dict[str, torch.Tensor], path: Path) -> None:
        whole(tensors, path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(checkpoint, "save_file", flipped)
    with pytest.raises(CheckpointError, match="is not what was written"):
        train("run", sparse_llama={"training": {"samples": 0}})


def test_the_best_checkpoints_are_kept_beside_the_newest(train: Train, monkeypatch: pytest.MonkeyPatch):
    known = {0: 5.0, 1: 2.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 4.5, 6: 4.0}
    real, step = loop.validate, iter(known)

    def look(*arguments: Any) -> Any:
        del arguments
        return loop.Validation(known[next(step)])

    monkeypatch.setattr(loop, "validate", look)
    training = {"samples": 0, "eval_every": 1, "save_every": 1, "keep_last": 1, "keep_best": 2}
    run = train("run", sparse_llama={"training": training})
    assert names(run) == ["step_000001", "step_000002", "step_000006"]
    assert real is not look


def test_the_best_cannot_be_kept_where_they_are_not_known(workplace: Path, tmp_path: Path):
    from training.conftest import write_configuration

    changes = {"sparse_llama": {"training": {"keep_best": 1, "save_every": 3, "eval_every": 2}}}
    with pytest.raises(
        ConfigError, match=r"keep_best is 1, save_every 3 and eval_every 2: .* a multiple of it"
    ):
        load_run(write_configuration(workplace, tmp_path, changes), Overrides(), world_size=1)


def test_a_checkpoint_with_other_moments_is_refused(train: Train, saved: Path):
    folder = saved / "checkpoints" / "step_000006"
    tensors = load_file(folder / "optimizer.safetensors")
    name = next(name for name in tensors if name.startswith("exp_avg/"))
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, folder / "optimizer.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"]["optimizer.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(CheckpointError, match="not the moments of step_000006's adapter"):
        train("run", flags={"resume": "auto"}, **SAVING)


def test_two_jobs_do_not_share_an_output_folder(train: Train, saved: Path):
    before = (saved / "run.json").read_bytes()
    with OutputFolder(saved), pytest.raises(ConfigError, match="another process is training there"):
        train("run", flags={"resume": "auto"}, **SAVING)
    assert (saved / "run.json").read_bytes() == before
