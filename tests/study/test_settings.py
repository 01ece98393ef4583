"""A study's document, its presets, and the documents of its runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_llama.config.document import read_document
from sparse_llama.config.run import EMBEDDED
from sparse_llama.errors import ConfigError
from sparse_llama.study.runs import Study, StudyRun, merge
from sparse_llama.study.settings import StudySettings, read_study

PRESETS = sorted((Path(__file__).parents[2] / "ds_configs" / "studies").glob("*.json"))
TWO: dict[str, Any] = {"variants": {"dense": {"changes": {"sparse_attention": None}}, "sparse": {}}}


def study_of(folder: Path, **block: Any) -> Study:
    return Study("mine", StudySettings.parse(TWO | {"lengths": [128]} | block), folder, folder / "out")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_run_of_a_preset_is_one_that_would_start(preset: Path, tmp_path: Path):
    study = Study(preset.stem, read_study(preset), preset.parent, tmp_path)
    runs = study.check()
    assert {run.seq_length for run in runs} == set(study.settings.lengths)
    assert all(run.notices == () or study.settings.ds_config == "../cpu_demo.json" for run in runs.values())
    for run, resolved in runs.items():
        assert resolved.settings.seq_length == run.seq_length
        assert resolved.settings.seed == run.seed
        assert resolved.layouts.is_dense == run.variant.endswith("dense")
        assert resolved.output_dir == tmp_path / "runs" / run.name


@pytest.mark.parametrize(("name", "length"), [("config_1", 1024), ("config_2", 512)])
def test_the_reports_hyperparameters(name: str, length: int, tmp_path: Path):
    """Its Table 1: batches of 64 in micro-batches of 4, 9,756 of these: 609 steps; weight decay 0.02."""
    preset = next(path for path in PRESETS if path.stem == name)
    study = Study(name, read_study(preset), preset.parent, tmp_path)
    runs = study.check()
    assert [(run.variant, run.seq_length) for run in runs] == [
        (variant, length) for variant in ("v1-dense", "v1-sparse", "v2-dense", "v2-sparse")
    ]
    assert len(study.settings.corrected) >= 8
    for run in runs.values():
        assert run.micro_batch_size == 4
        assert run.global_batch_size == 64
        assert run.settings.training.steps == 9756 // (64 // 4)
        assert run.deepspeed["optimizer"]["params"]["weight_decay"] == 0.02
        assert not run.settings.data.packing
        assert run.settings.data.dataset == "databricks/databricks-dolly-15k"
        assert (run.settings.data.validation_records, run.settings.data.split_seed) == (2000, 42)


def test_changes_are_put_in_key_by_key():
    document = {"a": {"b": 1, "c": 2}, "d": [1, 2], "e": 3}
    merge(document, {"a": {"b": 5, "n": {"m": 6}}, "d": [7], "e": None, "x": None})
    assert document == {"a": {"b": 5, "c": 2, "n": {"m": 6}}, "d": [7]}


def test_a_run_is_the_document_with_the_studys_changes_its_variants_and_its_lengths(tmp_path: Path):
    (tmp_path / "mine.json").write_text(EMBEDDED.read_text(encoding="utf-8"), encoding="utf-8")
    study = study_of(
        tmp_path,
        ds_config="mine.json",
        lengths=[128, 256],
        seeds=[1, 2],
        changes={"gradient_clipping": 0.5, "sparse_llama": {"adapter": {"prompt_length": 3}}},
        changes_at={"256": {"gradient_clipping": 0.25}},
    )
    runs = study.check()
    assert [run.name for run in runs] == [
        f"{variant}_{length}_seed{seed}"
        for length in (128, 256)
        for seed in (1, 2)
        for variant in ("dense", "sparse")
    ]
    last = read_document(study.document_of(StudyRun("dense", 256, 2)))
    whole = read_document(EMBEDDED)
    assert "sparse_attention" not in last
    assert last["gradient_clipping"] == 0.25
    assert last["sparse_llama"]["adapter"] == whole["sparse_llama"]["adapter"] | {"prompt_length": 3}
    assert last["optimizer"] == whole["optimizer"]
    first = read_document(study.document_of(StudyRun("sparse", 128, 1)))
    assert first["gradient_clipping"] == 0.5
    assert first["sparse_attention"] == whole["sparse_attention"]


def test_runs_of_equal_time_come_after_those_that_they_are_measured_by(tmp_path: Path):
    study = study_of(tmp_path, compare=["equal_steps", "equal_time"])
    assert [run.name for run in study.all_runs()] == [
        "dense_128_seed42",
        "sparse_128_seed42",
        "sparse_128_seed42_equal_time",
    ]
    file = study.write_document(study.all_runs()[-1], steps=7)
    training = read_document(file)["sparse_llama"]["training"]
    assert training["steps"] == 7
    assert "epochs" not in training


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"lengths": []}, "lengths: must have at least 1 entry, got []"),
        ({"lengths": [64, 64]}, "lengths: [64, 64] names one twice; keep one of them"),
        ({"lengths": [1]}, "lengths[0]: must be >= 2, got 1"),
        ({"variants": {}}, "variants: must have at least 1 entry, got {}"),
        ({"variants": {"a/b": {}}}, "variants: 'a/b' cannot be a folder's name"),
        ({"variants": {"a": {"chnges": {}}}}, "variants.a.chnges: unknown key; did you mean 'changes'?"),
        ({"reference": "dens"}, "reference: no variant is called 'dens'; did you mean 'dense'?"),
        ({"compare": ["equal_time"]}, "compare: equal_time is as long as the runs of equal_steps take"),
        ({"changes_at": {"65": {}}}, "changes_at: '65' is none of the lengths, [64]"),
        ({"evaluation": {"record": 3}}, "evaluation.record: unknown key; did you mean 'records'?"),
        ({"evaluation": {"retrieval": {"kind": "neddle"}}}, "evaluation.retrieval.kind: must be 'needle' or"),
    ],
)
def test_a_mistake_is_one_line(block: dict[str, Any], said: str, tmp_path: Path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(TWO | {"lengths": [64]} | block), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        read_study(file)
    assert said in str(refused.value)
    assert str(refused.value).startswith(str(file))
    assert "\n" not in str(refused.value)


def test_a_run_that_would_be_refused_is_named_before_any_starts(tmp_path: Path):
    study = study_of(tmp_path, changes={"optimizer": {"params": {"lr": -1}}})
    with pytest.raises(ConfigError, match=r"mine: run dense_128_seed42: optimizer\.params\.lr: .*"):
        study.check()


def test_a_document_that_has_changed_is_not_mixed_with_runs_of_the_old_one(tmp_path: Path):
    study = study_of(tmp_path)
    study.check()
    run = StudyRun("sparse", 128, 42)
    study.folder_of(run).mkdir(parents=True)
    (study.folder_of(run) / "run.json").write_text("{}", encoding="utf-8")
    study.check()
    changed = study_of(tmp_path, changes={"gradient_clipping": 0.5})
    with pytest.raises(ConfigError, match="the run was of another document than it is of now"):
        changed.check()
    changed.check(is_anew=True)
