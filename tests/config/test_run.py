"""The resolved run: what DeepSpeed gets, what is saved, and that none of it needs torch."""

import json
import os
from pathlib import Path

import pytest

from sparse_llama.config.deepspeed import OUR_BLOCKS, check_document
from sparse_llama.config.layers import layer_sparsities
from sparse_llama.config.run import EMBEDDED, Overrides, load_run
from sparse_llama.config.settings import Settings

ROOT = Path(__file__).parents[2]
SECRETS = {"HF_TOKEN": "hf_51d0a7", "WANDB_API_KEY": "wandb-9e3c", "COMET_API_KEY": "comet-77b1"}


@pytest.fixture(params=["a100_40g", "cpu_demo"])
def shipped(request: pytest.FixtureRequest) -> Path:
    return ROOT / "ds_configs" / f"{request.param}.json"


def test_a_saved_run_is_json_and_describes_the_same_run_again(shipped: Path, tmp_path: Path):
    flags = Overrides(steps=7, zero_stage=2, offload="cpu", output_dir=tmp_path / "out", overwrite=True)
    run = load_run(shipped, flags, 2)
    saved = json.loads(json.dumps(run.to_json(), allow_nan=False))
    assert saved == run.to_json()
    assert Settings.parse(saved["sparse_llama"]) == run.settings
    assert layer_sparsities(saved["sparse_attention"]) == run.layouts
    assert saved["deepspeed"] == run.deepspeed
    assert saved["schedule"]["total_steps"] == 7

    again = tmp_path / shipped.name
    document = saved["deepspeed"] | {key: saved[key] for key in OUR_BLOCKS}
    document["scheduler"] = {
        "type": run.schedule.type,
        "params": {
            "warmup_type": run.schedule.warmup_type,
            "cos_min_ratio": run.schedule.cos_min_ratio,
            "warmup_num_steps": run.schedule.warmup_steps,
        },
    }
    again.write_text(json.dumps(document), encoding="utf-8")
    repeated = load_run(again, Overrides(output_dir=tmp_path / "out", overwrite=True), 2)
    assert repeated.to_json() == saved | {"config_path": str(again)}


def test_a_saved_run_holds_nothing_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    saved = json.dumps(load_run(None, Overrides(output_dir=tmp_path), 1).to_json())
    assert not [value for value in SECRETS.values() if value in saved]
    long = [value for value in os.environ.values() if len(value) > 30 and value not in str(EMBEDDED)]
    assert not [value for value in long if value in saved]


def test_a_run_cannot_be_changed_through_what_it_saves(tmp_path: Path):
    run = load_run(None, Overrides(output_dir=tmp_path), 1)
    run.to_json()["deepspeed"]["optimizer"]["params"]["lr"] = -1
    assert run.deepspeed["optimizer"]["params"]["lr"] > 0


def test_loading_a_run_does_not_change_the_document(load):
    document = {"optimizer": {"type": "adamw", "params": {"betas": [0.9, 0.95]}}, "bf16": {"enabled": False}}
    before = json.dumps(document)
    run = load(document, lr=1e-4, zero_stage=2, offload="cpu")
    assert json.dumps(document) == before
    assert run.deepspeed["optimizer"] == {"type": "AdamW", "params": {"betas": [0.9, 0.95], "lr": 1e-4}}


def test_the_precision_is_that_of_the_block_that_is_on(load):
    assert load({}).precision == "fp32"
    assert load({"bf16": {"enabled": False}}).precision == "fp32"
    assert load({"bf16": {"enabled": True}}).precision == "bf16"
    assert load({"fp16": {"enabled": True}, "bf16": {"enabled": False}}).precision == "fp16"


def test_the_presence_of_the_checkpointing_block_turns_it_on(load):
    assert load({}).checkpointing is None
    assert load({"activation_checkpointing": {}}).checkpointing is not None
    cpu = load({"activation_checkpointing": {"cpu_checkpointing": True}}).checkpointing
    assert cpu.cpu_checkpointing


def test_deepspeed_gets_the_schedulers_that_it_runs_and_no_others(load):
    assert "scheduler" not in load({"scheduler": {"type": "WarmupLR"}}).deepspeed
    cycle = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}}
    run = load({"scheduler": cycle})
    assert run.schedule is None
    assert run.deepspeed["scheduler"] == cycle


def test_neither_the_configuration_nor_the_command_line_imports_torch(run_python):
    source = (
        "import sys\n"
        "import sparse_llama.config.run, sparse_llama.cli\n"
        "from pathlib import Path\n"
        "from sparse_llama.config.flags import Overrides\n"
        "sparse_llama.config.run.load_run(None, Overrides(output_dir=Path('/nonexistent/out')), 1)\n"
        "print(sorted({'torch', 'deepspeed', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    assert run_python(source).strip() == "[]"


def test_defaults_of_every_block_are_themselves_allowed():
    """pydantic does not check defaults."""
    plain = check_document({}).model_dump(mode="json", by_alias=True)
    kept = {key: value for key, value in plain.items() if value is not None}
    assert check_document(kept).model_dump() == check_document({}).model_dump()
