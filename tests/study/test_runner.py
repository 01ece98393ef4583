"""Jobs that end as jobs do, with a script in place of training: what is recorded, and what another call
does."""

import json
import sys
from pathlib import Path

import pytest
from study.fabricated import fabricate

from sparse_llama.study.runner import read_outcome, train
from sparse_llama.study.runs import Study, StudyRun

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
words = sys.argv[1:]
folder = Path(words[words.index("--output_dir") + 1])
with (folder / "calls").open("a") as calls:
    print(json.dumps([word for word in words if not word.startswith("--local_rank")]), file=calls)
(folder / "run.json").write_text("{}")
how = json.loads(Path(words[words.index("--ds_config") + 1]).read_text())["gradient_clipping"]
if how == 1:
    print("step 3/3")
elif how == 2:
    print("error: mine.json: gradient_clipping: must not be 2", file=sys.stderr)
    sys.exit(2)
elif how == 3:
    print("error: out of memory: 1 GiB more asked for on the host\\n\\n  where  here", file=sys.stderr)
    sys.exit(3)
elif how == 4:
    raise RuntimeError("a mistake of ours")
elif how == 5:
    os.kill(os.getpid(), signal.SIGKILL)
"""
RUN = StudyRun("sparse", 128, 1)


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    folder = tmp_path / "launch"
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT, encoding="utf-8")
    return folder


@pytest.fixture
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the script itself: the launcher takes 3 s, and hands its exit status on."""
    monkeypatch.setattr("sparse_llama.study.runner.launcher_command", lambda _: [sys.executable])


def study_that(how: int, folder: Path) -> Study:
    return fabricate(folder, seeds=[1], changes={"gradient_clipping": how})


def calls(study: Study) -> list[list[str]]:
    lines = (study.folder_of(RUN) / "calls").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.usefixtures("without_launcher")
@pytest.mark.parametrize(
    ("how", "status", "reason", "is_final"),
    [
        (1, "done", "", True),
        (2, "refused", "mine.json: gradient_clipping: must not be 2", False),
        (3, "out of memory", "out of memory: 1 GiB more asked for on the host", True),
        (4, "crashed", "RuntimeError: a mistake of ours", False),
        (5, "crashed", "exit status", False),
    ],
)
def test_however_a_run_ends_it_is_recorded(
    how: int, status: str, reason: str, is_final: bool, tmp_path: Path, scripts: Path
):
    study = study_that(how, tmp_path)
    watched: list[int] = []
    outcome = train(study, RUN, scripts, lambda: watched.append(1))
    assert outcome.status == status
    assert reason in outcome.reason
    assert "\n" not in outcome.reason
    assert outcome.is_final == is_final
    assert read_outcome(study.folder_of(RUN)) == outcome
    assert watched, "nobody would see it go on"
    assert outcome.command.startswith(f"deepspeed launch/train.py --ds_config {study.document_of(RUN)}")


@pytest.mark.usefixtures("without_launcher")
def test_a_run_that_was_stopped_goes_on_from_its_checkpoint_or_begins_anew(tmp_path: Path, scripts: Path):
    study = study_that(1, tmp_path)
    train(study, RUN, scripts, lambda: None)
    train(study, RUN, scripts, lambda: None)
    checkpoint = study.folder_of(RUN) / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": {}}', encoding="utf-8")
    train(study, RUN, scripts, lambda: None)
    document, folder = str(study.document_of(RUN)), str(study.folder_of(RUN))
    words = ["--ds_config", document, "--output_dir", folder]
    assert calls(study) == [words, [*words, "--overwrite"], [*words, "--resume"]]


@pytest.mark.usefixtures("without_launcher")
def test_an_interrupt_ends_the_job_and_records_nothing(tmp_path: Path, scripts: Path):
    (scripts / "train.py").write_text("import time; time.sleep(600)", encoding="utf-8")
    study = study_that(1, tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(study, RUN, scripts, interrupt)
    assert read_outcome(study.folder_of(RUN)) is None


def test_a_study_of_several_processes_starts_as_many_and_hears_how_they_ended(tmp_path: Path, scripts: Path):
    (scripts / "train.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        "(folder / os.environ['RANK']).write_text(os.environ['WORLD_SIZE'])\n"
        "sys.exit(3)\n",
        encoding="utf-8",
    )
    made = study_that(1, tmp_path)
    study = Study(made.name, made.settings, made.documents, made.output_dir, num_ranks=2)
    assert train(study, RUN, scripts, lambda: None).status == "out of memory"
    folder = study.folder_of(RUN)
    assert [(folder / rank).read_text() for rank in ("0", "1")] == ["2", "2"]
