"""``launch/study.py`` as users start it: real runs, a report, a second call, and mistakes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_processes import process_environment

from sparse_llama import cli
from sparse_llama.study.runner import Outcome

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "changes": {
        "tensorboard": None,
        "sparse_llama": {
            "model": {"path": "bundled:tiny-llama"},
            "training": {"steps": 2, "samples": 0, "exact_match_records": 0},
        },
    },
    "variants": {"v2-dense": {"changes": {"sparse_attention": None}}},
    "lengths": [128],
    "evaluation": {
        "records": 4,
        "max_new_tokens": 8,
        "prompts": ["Where does Ann live?"],
        "retrieval": {"kind": "pairs", "depths": 2, "trials": 1},
    },
}


def write(folder: Path, **block: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(json.dumps(TINY | block), encoding="utf-8")
    return path


def start(preset: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/study.py", "--preset", str(preset), "--output_dir", str(folder), *flags],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(cli.study, cli.study_parser("doc"), list(flags))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_study_trains_measures_and_reports_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = tmp_path / "text.txt"
    text.write_text("Ann lives in Oslo. Tom has a cat. " * 40, encoding="utf-8")
    nowhere = str(tmp_path / "no.txt")
    evaluation = TINY["evaluation"] | {"texts": [str(text), nowhere]}
    preset, folder = write(tmp_path, evaluation=evaluation), tmp_path / "out"
    done = start(preset, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "runs" / "v2-dense_128_seed42"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    measured = json.loads((run / "measured.json").read_text(encoding="utf-8"))
    base = json.loads((folder / "runs" / "base_128" / "measured.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2
    assert measured["records"]["nll_per_token"] < base["records"]["nll_per_token"]
    assert measured["records"]["window"] == 128
    assert list(measured["answers"]) == ["Where does Ann live?"]
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 4
    assert sum(one["rouge_l"] for one in answers) > 0
    assert measured["texts"][str(text)]["perplexity"] > 1
    assert "no such file" in measured["texts"][nowhere]["error"], "and the other text is measured"
    cells = measured["retrieval"]["cells"]
    assert [(cell["length"], cell["depth"]) for cell in cells] == [(128, 0), (128, 1)]
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert f"{summary['validation_loss']:.4f}" in report
    assert "1 of 1 runs are done" in report
    for name in ("losses", "positions_128_0", "retrieval_exact_128", "retrieval_loss_128"):
        assert f"({name}.png)" in report
        assert (folder / f"{name}.png").stat().st_size > 5_000
    (run / "measured.json").unlink()
    asked: list[Any] = []

    def measure(at: Path, order: dict[str, Any], _: Any) -> Outcome:
        asked.append((at, order["adapter"]))
        return Outcome("done")

    monkeypatch.setattr("sparse_llama.study.runner.measure", measure)
    words = ["--preset", str(preset), "--output_dir", str(folder)]
    cli.main(cli.study, cli.study_parser("doc"), words)
    assert asked == [(run, str(run))], "the base, and the training, are there already"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--preset or --ds_configs: give one of them"),
        (("--preset", "cpu_dmo"), "--preset cpu_dmo: no such study in"),
        (("--preset", "no.json"), "no.json: no such file"),
        (("--ds_configs", "no.json"), "no.json: no such file"),
        (("--preset", "MINE", "--ranks", "0"), "--ranks: must be >= 1, got 0"),
        (("--preset", "MINE", "--lengths", "12,x"), "--lengths: must be whole numbers above 0"),
        (("--preset", "MINE", "--lengths", "1"), "lengths[0]: must be >= 2, got 1"),
        (("--preset", "MINE", "--baseline", "nowhere"), "nowhere: holds no study"),
        (("--preset", "MINE", "--stes", "3"), "--stes: unknown flag"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: tuple[str, ...], said: str
):
    mine = str(write(tmp_path))
    given = [mine if flag == "MINE" else flag for flag in flags]
    assert said in refusal(capsys, *given, "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out" / "runs").exists()


def test_a_folder_of_another_study_is_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = ("--output_dir", str(tmp_path / "out"))
    cli.main(cli.study, cli.study_parser("doc"), ["--preset", str(write(tmp_path)), *folder, "--only_report"])
    assert "0 of 1 runs are done" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    capsys.readouterr()
    other = ("--preset", str(write(tmp_path, lengths=[256])), *folder)
    assert "holds another study (other settings); start anew with --overwrite" in refusal(capsys, *other)
    cli.main(cli.study, cli.study_parser("doc"), [*other, "--overwrite", "--only_report"])
    saved = json.loads((tmp_path / "out" / "study.json").read_text(encoding="utf-8"))
    assert saved["settings"]["lengths"] == [256]


def test_documents_can_be_compared_without_a_study(tmp_path: Path):
    documents = []
    for name, loss_tile in (("plain", None), ("tiled", 64)):
        file = tmp_path / f"{name}.json"
        settings = {"seq_length": 128, "training": {"steps": 2}, "memory": {"loss_tile": loss_tile}}
        batch = {"train_micro_batch_size_per_gpu": 2}
        optimizer = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
        file.write_text(json.dumps(batch | optimizer | {"sparse_llama": settings}), encoding="utf-8")
        documents.append(str(file))
    out = tmp_path / "out"
    words = ["--ds_configs", *documents, "--seeds", "1,2", "--output_dir", str(out), "--only_report"]
    cli.main(cli.study, cli.study_parser("doc"), words)
    made = sorted(path.stem for path in (out / "configs").iterdir())
    assert made == [f"{name}_128_seed{seed}" for name in ("plain", "tiled") for seed in (1, 2)]
    tiled = json.loads((out / "configs" / "tiled_128_seed2.json").read_text(encoding="utf-8"))
    assert tiled["sparse_llama"]["memory"]["loss_tile"] == 64
    assert tiled["sparse_llama"]["seed"] == 2
