"""Flags override the document for one run, and are refused where they mean nothing."""

import ctypes.util
import json
from pathlib import Path
from typing import Any

import pytest

from sparse_llama.config.run import Overrides, load_run
from sparse_llama.config.settings import Settings
from sparse_llama.errors import ConfigError

SPARSE = {"mode": "bslongformer", "block": 16, "attention": "unidirectional"}


@pytest.fixture(autouse=True)
def has_libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.1")


def places(zero: dict[str, Any]) -> tuple[str, str]:
    """Return where the optimizer and the parameters are."""
    return tuple(zero.get(name, {}).get("device", "none") for name in ("offload_optimizer", "offload_param"))


ALLOWED = {
    (0, "none"): ("none", "none"),
    (1, "none"): ("none", "none"),
    (2, "none"): ("none", "none"),
    (3, "none"): ("none", "none"),
    (1, "cpu"): ("cpu", "none"),
    (2, "cpu"): ("cpu", "none"),
    (3, "cpu"): ("cpu", "cpu"),
    (3, "nvme"): ("nvme", "nvme"),
}
"""What ``--offload`` means at each stage: stages 1 and 2 the optimizer, stage 3 optimizer and parameters."""


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
def test_a_stage_and_a_device_mean_what_the_table_says_or_are_refused(load, refusal, stage: int, device):
    flags = {
        "zero_stage": stage,
        "offload": device,
        "nvme_path": Path("/drive") if device == "nvme" else None,
    }
    if (stage, device) in ALLOWED:
        run = load({}, **flags)
        assert run.zero_stage == stage
        assert run.offload == device
        assert places(run.deepspeed["zero_optimization"]) == ALLOWED[stage, device]
    else:
        assert refusal({}, **flags) == (
            f"--offload {device}: not at ZeRO stage {stage}; stages 1 and 2 offload the optimizer to cpu, "
            "stage 3 optimizer and parameters to cpu or nvme; add --zero_stage "
            f"{'3' if device == 'nvme' else '1, 2 or 3'}"
        )


def test_the_offload_flag_keeps_the_documents_other_keys_and_drops_those_of_another_drive(load):
    zero = {
        "stage": 3,
        "offload_optimizer": {
            "device": "nvme",
            "nvme_path": "/drive",
            "buffer_count": 6,
            "pin_memory": False,
        },
    }
    document = {"zero_optimization": zero}
    assert load(document, offload="none").deepspeed["zero_optimization"] == {"stage": 3}
    assert load(document, offload="cpu").deepspeed["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu"},
    }


def test_the_documents_offload_is_kept_without_the_flag_and_refused_at_stage_0(load, refusal):
    document = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert load(document, zero_stage=1).offload == "cpu"
    assert refusal(document, zero_stage=0) == (
        "zero_optimization.offload_optimizer: stage 0 cannot offload; use stage 1 to 3, "
        "or drop it with --offload none"
    )
    assert load(document, zero_stage=0, offload="none").offload == "none"


def test_nvme_needs_a_folder_from_the_flag_or_from_the_document(load, refusal):
    assert refusal({}, zero_stage=3, offload="nvme") == (
        "--offload nvme: needs a folder on the drive; add --nvme_path FOLDER"
    )
    assert refusal({}, nvme_path=Path("/drive")) == (
        "--nvme_path /drive: nothing is offloaded to nvme; add --offload nvme or --checkpointing nvme"
    )
    block = {"device": "nvme", "nvme_path": "/old"}
    run = load({"zero_optimization": {"stage": 3, "offload_param": block}}, nvme_path=Path("/new"))
    assert run.deepspeed["zero_optimization"]["offload_param"]["nvme_path"] == "/new"


def test_flags_of_the_sparse_llama_block_replace_the_documents_values(load):
    document = {"sparse_llama": {"seq_length": 64, "seed": 1, "adapter": {"version": "v2", "start_layer": 1}}}
    settings = load(document, seq_length=128, seed=7, adapter="v1", model="org/model").settings
    assert (settings.seq_length, settings.seed) == (128, 7)
    assert (settings.adapter.version, settings.adapter.start_layer) == ("v1", 1)
    assert settings.model.path == "org/model"


def test_another_model_or_data_set_drops_what_belonged_to_the_old_one(load):
    document = {
        "sparse_llama": {
            "model": {"path": "org/model", "revision": "abc", "random_weights": True},
            "data": {"dataset": "org/data", "validation": "org/other", "packing": False},
        }
    }
    settings = load(document, model="bundled:tiny-llama", dataset="bundled:people").settings
    assert settings.model.revision is None
    assert settings.model.random_weights
    assert settings.data.dataset == "bundled:people"
    assert settings.data.validation is None
    assert not settings.data.packing


ROWS = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3}


@pytest.mark.parametrize(
    ("document", "size", "accumulation"),
    [
        (ROWS, 4, 6),
        (ROWS, 12, 2),
        (ROWS, 1, 24),
        ({"train_micro_batch_size_per_gpu": 8}, 2, 4),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 3}, 6, 4),
        (ROWS | {"train_batch_size": 24}, 6, 4),
    ],
)
def test_a_micro_batch_size_cuts_a_steps_rows_anew(load, document, size: int, accumulation: int):
    document = {"train_micro_batch_size_per_gpu": None} | document
    run = load(document, micro_batch_size=size)
    assert (run.micro_batch_size, run.gradient_accumulation_steps) == (size, accumulation)
    assert run.global_batch_size == load(document).global_batch_size


def test_a_micro_batch_size_that_would_change_a_steps_rows_is_refused(refusal):
    assert refusal(ROWS, micro_batch_size=5) == (
        "--micro_batch_size 5: does not divide the 24 rows that a step has on each rank; use one of 1, 2, 3, "
        "4, 6, 8, 12, 24"
    )
    assert "must be >= 1" in refusal(ROWS, micro_batch_size=0)


def test_steps_replace_epochs_and_epochs_replace_steps(load):
    steps = load({"sparse_llama": {"training": {"epochs": 3}}}, steps=5).settings.training
    assert (steps.steps, steps.epochs) == (5, None)
    epochs = load({"sparse_llama": {"training": {"steps": 5}}}, epochs=2).settings.training
    assert (epochs.steps, epochs.epochs) == (None, 2)


def test_the_lr_flag_is_the_peak_of_the_schedule(load):
    document = {"optimizer": {"type": "Lion"}, "sparse_llama": {"training": {"steps": 100}}}
    run = load(document, lr=3e-4)
    assert run.schedule.max_lr == 3e-4
    assert run.deepspeed["optimizer"] == {"type": "Lion", "params": {"lr": 3e-4}}


def test_the_lr_flag_is_refused_where_the_scheduler_would_win(refusal, load):
    cycle = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}}
    assert refusal({"scheduler": cycle}, lr=0.1) == (
        "--lr: scheduler OneCycle sets the learning rate by its own parameters; edit those"
    )
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01}}
    assert refusal({"scheduler": warmup}, lr=0.1) == (
        '--lr 0.1: scheduler.params.warmup_max_lr is 0.01 and would win; make it "auto"'
    )
    warmup["params"]["warmup_max_lr"] = "auto"
    assert load({"scheduler": warmup}, lr=0.1).schedule.max_lr == 0.1


def test_attention_dense_ignores_the_block_and_sparse_needs_it(load, refusal):
    run = load({"sparse_attention": SPARSE}, attention="dense")
    assert run.layouts.is_dense
    assert run.notices == ("sparse_attention: no effect with --attention dense",)
    assert not load({"sparse_attention": SPARSE}, attention="sparse").layouts.is_dense
    said = refusal({}, attention="sparse")
    assert said.startswith(
        "--attention sparse: the document has no sparse_attention block; add one, such as "
    )
    suggested = json.loads("{" + said.split("such as ")[1] + "}")
    assert not load(suggested, attention="sparse").layouts.is_dense


BAD: dict[str, dict[str, Any]] = {
    "--seq_length: must be >= 2 and < 2**63, got 1": {"seq_length": 1},
    "--steps: must be >= 1 and < 2**63, got 0": {"steps": 0},
    "--epochs: must be >= 1 and < 2**63, got -3": {"epochs": -3},
    "--seed: must be >= 0 and < 2**63, got -1": {"seed": -1},
    f"--seed: must be >= 0 and < 2**63, got {2**63}": {"seed": 2**63},
    "--lr: must be > 0, got 0.0": {"lr": 0.0},
    "--lr: must be > 0, got nan": {"lr": float("nan")},
    "--lr: must be > 0, got inf": {"lr": float("inf")},
    "--zero_stage: must be one of 0, 1, 2, 3, got 4": {"zero_stage": 4},
    "--offload: must be one of none, cpu, nvme, got disk": {"offload": "disk"},
    '--model: must be a hub id, a path or bundled:tiny-llama, got ""': {"model": ""},
    '--dataset: no bundled data set is called "bundled:x"; allowed: bundled:people': {"dataset": "bundled:x"},
    "--steps and --epochs exclude each other; give one of them": {"steps": 1, "epochs": 1},
    "--resume continues a run and --overwrite replaces it; give one of them": {
        "resume": "auto",
        "overwrite": True,
    },
}


@pytest.mark.parametrize(("line", "flags"), BAD.items(), ids=BAD)
def test_a_flag_that_is_wrong_whatever_the_document_says_is_refused(
    refusal, line: str, flags: dict[str, Any]
):
    assert refusal({}, **flags) == line


def test_results_go_to_runs_and_the_documents_name(write):
    run = load_run(write({"train_batch_size": 1}), Overrides(), 1)
    assert run.output_dir == Path("runs/mine")
    assert load_run(None, Overrides(output_dir=Path("/nonexistent/o")), 1).name == "cpu_demo"


def test_a_folder_with_another_run_is_refused_unless_it_is_continued_or_replaced(
    load, refusal, tmp_path: Path
):
    folder = tmp_path / "out"
    folder.mkdir()
    assert load({}).output_dir == folder  # an empty folder holds no run
    (folder / "run.json").write_text("{}", encoding="utf-8")
    assert refusal({}) == (
        f"{folder}: holds another run; continue it with --resume, replace it with --overwrite, "
        "or name another folder with --output_dir"
    )
    assert load({}, overwrite=True).overwrite
    (folder / "checkpoints").mkdir()
    assert load({}, resume="auto").resume == "auto"
    assert load({}, resume=folder).resume == folder


def test_other_ranks_leave_the_folder_to_the_main_one(write, tmp_path: Path):
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    path, flags = write({"train_batch_size": 2}), Overrides(output_dir=tmp_path)
    assert load_run(path, flags, 2, is_main=False).output_dir == tmp_path
    with pytest.raises(ConfigError, match="holds another run"):
        load_run(path, flags, 2, is_main=True)


def test_to_resume_where_nothing_is_is_refused_before_anything_is_loaded(refusal, tmp_path: Path):
    assert refusal({}, resume="auto") == (
        f"--resume: {tmp_path}/out/checkpoints does not exist; leave --resume out, or name the run's folder "
        "with --output_dir"
    )
    assert refusal({}, resume=Path("/nonexistent/step_000001")) == (
        "--resume /nonexistent/step_000001: no such folder; name that of a checkpoint, or use --resume alone"
    )


def test_an_output_folder_that_is_a_file_is_refused(refusal, tmp_path: Path):
    path = tmp_path / "file"
    path.touch()
    assert refusal({}, output_dir=path) == f"--output_dir {path}: a file; name a folder"


def test_no_flag_leaves_the_document_as_it_is(load):
    document = {"sparse_llama": {"seq_length": 99}, "gradient_clipping": 0.5}
    run = load(document)
    assert run.deepspeed["gradient_clipping"] == 0.5
    assert run.settings.model_copy(
        update={"attention": Settings().attention, "training": Settings().training}
    ) == Settings(seq_length=99)
