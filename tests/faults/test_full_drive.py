"""A drive that is full, for a while or for good: the run goes on, and says what is not saved."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_table import FaultsRecord
from faults.nursery import Nursery, wait_for
from faults.training_jobs import Jobs
from training.conftest import train_in

pytestmark = pytest.mark.faults
TRAINING = {"steps": 12, "samples": 0, "save_every": 2, "keep_last": 9}
SAVING = {"sparse_llama": {"training": TRAINING}}
PLACES = {
    "writing the optimizer's file": "sparse_llama.training.checkpoint.save_file",
    "writing the adapter's file": "sparse_llama.training.checkpoint.write_adapter_folder",
    "flushing": "os.fsync",
    "publishing": "pathlib.Path.rename",
    "naming the newest": "sparse_llama.training.checkpoint.write_durably",
}


@pytest.fixture(scope="module")
def whole(workplace: Path, tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Jobs:
    jobs = Jobs(nursery, workplace, tmp_path_factory.mktemp("whole"), SAVING)
    assert jobs.run() == [0], jobs.log.read_text(encoding="utf-8")
    return jobs


@pytest.mark.parametrize("place", PLACES)
def test_a_full_drive_in_the_middle_of_a_save_costs_that_save_only(
    place: str, nursery: Nursery, workplace: Path, tmp_path: Path, whole: Jobs, faults_record: FaultsRecord
):
    jobs = Jobs(nursery, workplace, tmp_path, SAVING)
    assert jobs.run(fail_at_call=(PLACES[place], 2, 4)) == [0], jobs.log.read_text(encoding="utf-8")
    said = jobs.log.read_text(encoding="utf-8")
    assert "cannot be written (No space left on device)" in " ".join(said.split())
    assert jobs.damaged() == []
    assert jobs.result() == whole.result()
    faults_record("drive full in a save", injected=1, survived=1)


def test_a_file_that_may_not_grow_is_no_half_checkpoint(
    nursery: Nursery, workplace: Path, tmp_path: Path, faults_record: FaultsRecord
):
    """By the system's own limit, in the middle of a write; nothing of it is announced."""
    jobs = Jobs(nursery, workplace, tmp_path, SAVING)
    assert jobs.run(max_file_bytes=9_000) == [2]
    said = jobs.log.read_text(encoding="utf-8")
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ")
    assert "cannot be written" in said.splitlines()[-1]
    assert (jobs.newest_step(), jobs.damaged()) == (0, [])
    faults_record("file size limit", injected=1, survived=1)


@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Path]:
    """A drive of 3 MiB; skip where none can be made."""
    folder = tmp_path / "drive"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(command, capture_output=True, check=False).returncode != 0
    ):
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_real_drive_that_fills_up_and_is_emptied_again(
    nursery: Nursery,
    workplace: Path,
    tmp_path: Path,
    small_drive: Path,
    whole: Jobs,
    faults_record: FaultsRecord,
):
    """Another program fills the last byte after the first save, and leaves after a few more steps."""
    jobs = Jobs(nursery, workplace, tmp_path, SAVING)
    jobs.output_dir.symlink_to(small_drive, target_is_directory=True)
    jobs.start()
    assert wait_for(lambda: jobs.newest_step() >= 2)
    hog = small_drive / "hog"
    with hog.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    assert wait_for(lambda: "No space left" in jobs.log.read_text(encoding="utf-8"))
    hog.unlink()
    assert jobs.wait() == [0], jobs.log.read_text(encoding="utf-8")
    assert jobs.damaged() == []
    assert jobs.result() == whole.result()
    faults_record("a real drive full for a while", injected=1, survived=1)


def test_a_drive_that_can_only_be_read_is_refused_before_anything_is_loaded(
    nursery: Nursery, workplace: Path, tmp_path: Path, small_drive: Path, faults_record: FaultsRecord
):
    subprocess.run(["mount", "-o", "remount,ro", str(small_drive)], check=True)
    jobs = Jobs(nursery, workplace, tmp_path, SAVING)
    jobs.output_dir.symlink_to(small_drive, target_is_directory=True)
    assert jobs.run() == [2]
    said = jobs.log.read_text(encoding="utf-8")
    assert f"error: {jobs.output_dir}: cannot be written (Read-only file system)" in said
    assert "loading" not in said
    faults_record("read-only folder", injected=1, survived=1)


def test_a_checkpoint_folder_that_was_made_unreadable_is_passed_over(
    workplace: Path, tmp_path: Path, faults_record: FaultsRecord
):
    """A folder where a file should be: what a copy that went wrong leaves."""
    train = train_in(workplace, tmp_path)
    run = train("run", **SAVING)
    file = run / "checkpoints" / "step_000012" / "optimizer.safetensors"
    file.unlink()
    os.mkdir(file)
    train("run", flags={"resume": "auto"}, **SAVING)
    faults_record("a folder in place of a file", injected=1, survived=1)
