"""What plain LLaMA cannot hold can be left out: what that costs is told, and what is left is exact."""

import json
from typing import Any

import pytest
import torch
from exported_runs import LAYOUT, MASTER_LENGTH, formula, ids, open_export
from oracles.masked_attention import relative_error
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.attention.interface import AttentionPlan, attach_attention
from sparse_llama.config.settings import Settings
from sparse_llama.data.prepare import prepare_data
from sparse_llama.data.tokenizer import load_tokenizer
from sparse_llama.errors import ConfigError, DataError, ExportError
from sparse_llama.evaluation.loss import mean_token_loss
from sparse_llama.export import export_merged
from sparse_llama.model.objective import TokenLoss

GATES, HEAD_BIAS = "zero_init.gate", "lm_head.adapter_bias"


@pytest.fixture
def whole_run(trained_run, write_run_json):
    """Return a function that makes a run with the ``run.json`` that training leaves."""

    def make(*arguments, **keywords):
        run = trained_run(*arguments, **keywords)
        write_run_json(run.folder)
        return run

    return make


def validation_loss(model: LlamaForCausalLM, base, settings: Settings) -> float:
    """Return what training calls the validation loss."""
    data = prepare_data(settings, load_tokenizer(base), align=4, micro_batch_size=1, rank=0, world_size=1)
    return mean_token_loss(TokenLoss(model).eval(), data.validation_batches)


def switch_off(model: LlamaForCausalLM, *endings: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(endings):
                parameter.zero_()


def test_with_nothing_left_to_ship_the_folder_is_a_plain_llama(whole_run, tmp_path):
    run = whole_run("v2")
    exported = export_merged(run.folder, tmp_path / "out", leave_out=["prompt", "head_bias"])
    assert not exported.needs_code
    assert not list((tmp_path / "out").glob("*.py"))
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in document
    assert document["architectures"] == ["LlamaForCausalLM"]
    assert document["model_type"] == "llama"
    opened: Any = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, found = opened
    assert not any(found[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model.config) is LlamaConfig
    with torch.no_grad():
        logits = model.eval()(input_ids=ids()).logits
    assert relative_error(logits, formula(run, {}, without=(GATES, HEAD_BIAS))) < 1e-5
    assert relative_error(logits, formula(run, {})) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(("part", "ending"), [("prompt", GATES), ("head_bias", HEAD_BIAS)])
def test_one_part_is_left_out_and_the_other_stays(whole_run, tmp_path, part, ending):
    run = whole_run("v2", tie_word_embeddings=True)
    exported = export_merged(run.folder, tmp_path / "out", leave_out=[part])
    assert exported.needs_code
    logits = open_export(tmp_path / "out")(input_ids=ids()).logits
    assert relative_error(logits, formula(run, {}, without=(ending,))) < 1e-5


@torch.no_grad()
def test_dense_attention_leaves_the_layout_out(whole_run, tmp_path):
    run = whole_run("v2", layout=LAYOUT)
    exported = export_merged(run.folder, tmp_path / "out", leave_out=["layout"])
    assert exported.needs_code  # prompts and the head's bias are still there
    logits = open_export(tmp_path / "out")(input_ids=ids(MASTER_LENGTH)).logits
    assert relative_error(logits, run.model(input_ids=ids(MASTER_LENGTH)).logits) > 1e-2
    dense = AttentionPlan((None,) * 4)
    attach_attention(run.model, dense)
    run.model.set_attn_implementation("zero_init")
    assert relative_error(logits, run.model(input_ids=ids(MASTER_LENGTH)).logits) < 1e-5


def test_a_sparse_run_needs_all_three_for_a_plain_folder(whole_run, tmp_path):
    run = whole_run("v2", layout=LAYOUT)
    left_out = export_merged(run.folder, tmp_path / "two", leave_out=["prompt", "head_bias"])
    assert left_out.needs_code_for == {"layout"}
    plain = export_merged(run.folder, tmp_path / "three", leave_out=["prompt", "head_bias", "layout"])
    assert not plain.needs_code
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(tmp_path / "three").eval()(input_ids=ids()).logits
    assert relative_error(logits, formula(run, {}, without=(GATES, HEAD_BIAS))) < 1e-5


@pytest.mark.parametrize("layout", [None, LAYOUT], ids=["dense", "sparse"])
def test_the_losses_are_those_that_training_calls_validation_loss(whole_run, tmp_path, settings, layout):
    run = whole_run("v2", layout=layout)
    losses = export_merged(run.folder, tmp_path / "out", leave_out=["prompt", "head_bias"]).losses
    assert losses is not None
    assert losses.trained == pytest.approx(validation_loss(run.model, run.base, settings), rel=1e-5)
    switch_off(run.model, GATES, HEAD_BIAS)
    assert losses.exported == pytest.approx(validation_loss(run.model, run.base, settings), rel=1e-5)
    assert abs(losses.exported - losses.trained) > 1e-2


def test_the_losses_are_measured_in_the_precision_of_the_export(whole_run, tmp_path, settings):
    run = whole_run("v2", dtype="bfloat16")
    losses = export_merged(run.folder, tmp_path / "out", leave_out=["head_bias"]).losses
    assert losses is not None
    exact = validation_loss(run.model, run.base, settings)
    assert losses.trained == pytest.approx(exact, rel=0.02)  # 8 bits
    assert losses.trained != pytest.approx(exact, rel=1e-6)


def test_a_checkpoint_finds_the_data_of_its_run(whole_run, tmp_path):
    run = whole_run("v2")
    (run.folder / "checkpoints").mkdir()
    step = (run.folder / "adapter").rename(run.folder / "checkpoints" / "step_000007")
    losses = export_merged(step, tmp_path / "out", leave_out=["prompt"]).losses
    assert losses is not None
    assert "sums.jsonl, 2 of 10 records" in losses.source


def test_an_adapter_without_its_run_is_measured_on_data_that_are_named(trained_run, tmp_path, data_file):
    run = trained_run("v2")
    with pytest.raises(ConfigError, match=r"--data: .* is not in a run's folder \(no run.json\)"):
        export_merged(run.folder / "adapter", tmp_path / "out", leave_out=["prompt"])
    losses = export_merged(
        run.folder / "adapter", tmp_path / "out", leave_out=["prompt"], data=str(data_file)
    ).losses
    assert losses is not None
    everything = Settings.parse(
        {"seq_length": MASTER_LENGTH, "data": {"dataset": str(data_file), "validation": str(data_file)}}
    )
    assert losses.trained == pytest.approx(validation_loss(run.model, run.base, everything), rel=1e-5)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ("./none.jsonl", "--data: ./none.jsonl: no such file"),
        ("bundled:peeple", "--data: no bundled data set is called .* did you mean"),
    ],
)
def test_data_that_are_not_there_are_one_line_and_cost_no_model(
    trained_run, tmp_path, monkeypatch, data, match
):
    monkeypatch.setattr("sparse_llama.export.write.make_reference", None)
    with pytest.raises((ConfigError, DataError), match=match):
        export_merged(trained_run("v2").folder, tmp_path / "out", leave_out=["prompt"], data=data)


def test_a_run_whose_data_have_gone_says_how_to_go_on(whole_run, tmp_path, data_file):
    run = whole_run("v2")
    data_file.unlink()
    with pytest.raises(DataError, match=r"run.json: .*sums.jsonl.*; name other data to measure on"):
        export_merged(run.folder, tmp_path / "out", leave_out=["prompt"])


def test_data_without_anything_to_leave_out_are_refused(whole_run, tmp_path, data_file):
    with pytest.raises(ConfigError, match="--data: is what --drop_prompt"):
        export_merged(whole_run("v2").folder, tmp_path / "out", data=str(data_file))


def test_a_part_that_is_not_there_is_noted_and_needs_no_data(trained_run, tmp_path):
    run = trained_run("v2", adapter={"lm_head": "scale"}, change=lambda model: switch_off(model, GATES))
    exported = export_merged(run.folder, tmp_path / "out", leave_out=["prompt", "head_bias"])
    assert exported.losses is None
    assert exported.left_out == frozenset()
    notes = [value for label, value in exported.rows() if label == "note"]
    assert notes == [
        "--drop_prompt: every gate is zero; nothing to leave out",
        "--drop_head_bias: the head has no bias; nothing to leave out",
    ]


def test_nothing_of_a_v1_adapter_is_left_without_its_prompts(trained_run, tmp_path):
    with pytest.raises(ExportError, match="a v1 adapter is its prompts"):
        export_merged(trained_run("v1").folder, tmp_path / "out", leave_out=["prompt"])


def test_dense_attention_of_a_dense_adapter_is_refused(trained_run, tmp_path):
    with pytest.raises(ExportError, match="trained with dense attention, there is no layout to leave out"):
        export_merged(trained_run("v2").folder, tmp_path / "out", leave_out=["layout"])


def test_the_table_says_why_there_is_code_and_which_flags_would_do_without(trained_run, tmp_path):
    def code(folder) -> str:
        return dict(export_merged(folder, tmp_path / "out", overwrite=True).rows())["modelling code"]

    assert code(trained_run("v2").folder) == (
        "for the prompts and the head's bias; none with --drop_prompt --drop_head_bias"
    )
    assert code(trained_run("v2", layout=LAYOUT, adapter={"lm_head": "scale"}).folder) == (
        "for the prompts and the sparse layout; none with --drop_prompt --dense_attention"
    )
    assert code(trained_run("v1").folder) == "for the prompts"
    plain = trained_run("v2", adapter={"lm_head": False}, change=lambda model: switch_off(model, GATES))
    assert code(plain.folder) == "none, a plain LlamaForCausalLM"


def test_an_export_that_still_has_what_was_to_be_left_out_is_refused(whole_run, tmp_path, monkeypatch):
    """The adapted model with the part switched off is the judge, not the fold."""
    from sparse_llama.export import write

    real = write.plan_merge
    monkeypatch.setattr(write, "plan_merge", lambda *arguments: real(*arguments[:-1]))
    with pytest.raises(ExportError, match="relative error"):
        export_merged(whole_run("v2").folder, tmp_path / "out", leave_out=["prompt"])
    assert not list(tmp_path.glob("out*"))
