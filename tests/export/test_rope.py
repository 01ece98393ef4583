"""An export of an adapter that was trained beyond its base's range goes on beyond it, by transformers'
``rope_parameters`` alone."""

import json
from typing import Any

import pytest
import torch
from exported_runs import LAYOUT, TrainedRun, ids, open_export
from oracles.masked_attention import relative_error
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.adapters.attach import attach_adapters
from sparse_llama.adapters.rotation import rotation
from sparse_llama.adapters.weights import apply_adapter, read_adapter_folder, write_adapter_folder
from sparse_llama.config.rope import FixedRopeParameters
from sparse_llama.errors import ExportError
from sparse_llama.export import export_foreign, export_merged, export_native
from sparse_llama.export.reopen import decode
from sparse_llama.generation import longest_sequence
from sparse_llama.model.assemble import open_model

RANGE, LENGTH = 64, 192  # what the base was made for, and what the adapter was trained at
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 3.0,
        "original_max_position_embeddings": RANGE,
        "beta_fast": 12.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 3.0,
        "original_max_position_embeddings": RANGE,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def without_code(model: LlamaForCausalLM) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("zero_init.gate"):
            parameter.zero_()


@pytest.fixture
def long_run(trained_run):
    """Return a function that writes a run whose adapter was trained at ``LENGTH`` tokens by ``rope``."""

    def make(rope: dict[str, Any], version: str = "v2", **keywords: Any) -> TrainedRun:
        run = trained_run(version, **keywords)
        file, tensors = read_adapter_folder(run.folder / "adapter")
        changes = {"rope_parameters": FixedRopeParameters.parse(rope), "seq_length": LENGTH}
        write_adapter_folder(run.folder / "adapter", tensors, file.model_copy(update=changes))
        return run

    return make


def expected_logits(run: TrainedRun, rope: dict[str, Any], batch: torch.Tensor) -> torch.Tensor:
    """Return what transformers' own model, opened with ``rope``, computes with the adapter attached."""
    config = LlamaConfig.from_pretrained(run.base)
    config.rope_parameters, config.max_position_embeddings = dict(rope), LENGTH  # type: ignore[assignment]
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(run.base, config=config)
    file, tensors = read_adapter_folder(run.folder / "adapter")
    attach_adapters(model, file.adapter)
    apply_adapter(model, tensors)
    with torch.no_grad():
        return model.eval()(input_ids=batch, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_an_export_has_the_adapted_models_logits_beyond_the_bases_range(long_run, tmp_path, rope):
    run = long_run(rope)
    exported = export_merged(run.folder, tmp_path / "out")
    assert exported.needs_code
    batch = ids(LENGTH)
    expected = expected_logits(run, rope, batch)
    model = open_export(tmp_path / "out")
    assert relative_error(model(input_ids=batch).logits, expected) < 1e-5
    decoded = decode(model, batch[:1], 100)  # from within the range to beyond it, with a cache
    assert relative_error(decoded, expected[0, -100:]) < 1e-5
    ours = open_model(None, run.folder / "adapter").model
    assert relative_error(ours(input_ids=batch).logits, expected) < 1e-5
    within = run.model(input_ids=batch).logits  # by the base's own turns
    assert relative_error(within, expected) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_a_plain_export_is_a_plain_llama_beyond_the_range(long_run, tmp_path, rope):
    run = long_run(rope, change=without_code, adapter={"lm_head": False})
    exported = export_merged(run.folder, tmp_path / "out")
    assert not exported.needs_code
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    batch = ids(LENGTH)
    assert relative_error(model(input_ids=batch).logits, expected_logits(run, rope, batch)) < 1e-5
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document["rope_parameters"] == rope
    assert document["max_position_embeddings"] == LENGTH
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    is_scaled = rope["rope_type"] != "default"  # transformers 4 has other names
    assert document["rope_scaling"] == (scaling if is_scaled else None)
    assert document["rope_theta"] == rope["rope_theta"]


@torch.no_grad()
def test_a_layout_goes_on_beyond_the_range_too(long_run, tmp_path):
    run = long_run(ROPES["yarn"], layout=LAYOUT)
    export_merged(run.folder, tmp_path / "out")
    ours, theirs = open_model(None, run.folder / "adapter").model, open_export(tmp_path / "out")
    assert longest_sequence(ours)[0] == longest_sequence(theirs)[0] == LENGTH
    batch = ids(LENGTH)
    found = theirs(input_ids=batch).logits
    assert relative_error(found, ours(input_ids=batch).logits) < 1e-5
    dense = open_model(None, run.folder / "adapter", dense_attention=True).model
    assert relative_error(found, dense(input_ids=batch).logits) > 1e-2


def test_an_export_that_turns_otherwise_is_not_published(long_run, tmp_path, monkeypatch):
    """The tokens that are compared lie within the range, where a long wave's turn is a rounding error."""
    run = long_run({"rope_type": "default", "rope_theta": 1.000001e4})
    monkeypatch.setattr("sparse_llama.export.source.with_rotation", lambda base, rope, num_tokens: base)
    with pytest.raises(ExportError, match="turns positions otherwise than the adapted one; nothing was"):
        export_merged(run.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["peft", "lit-llama", "litgpt", "llama-adapter"])
def test_formats_without_a_word_for_positions_are_refused(long_run, tmp_path, format):
    run = long_run(ROPES["linear"], "v1", adapter={"gate": "scalar"}, num_key_value_heads=4, head_dim=8)
    with pytest.raises(ExportError) as refused:
        export_foreign(format, run.folder, tmp_path / "out")
    assert str(refused.value) == (
        f"--format {format}: has no word for the positions that the adapter was trained with (linear, factor "
        "3.0, rope_theta 10000.0), and its program would turn them as the base does; use --format merged or "
        "native"
    )
    assert not (tmp_path / "out").exists()


def test_a_native_export_keeps_them(long_run, tmp_path):
    run = long_run(ROPES["yarn"])
    export_native(run.folder, tmp_path / "out")
    file, _ = read_adapter_folder(tmp_path / "out")
    assert file.rope_parameters == FixedRopeParameters.parse(ROPES["yarn"])
    configs: list[Any] = [
        open_model(None, folder).model.config for folder in (tmp_path / "out", run.folder / "adapter")
    ]
    assert torch.equal(*map(rotation, configs))
