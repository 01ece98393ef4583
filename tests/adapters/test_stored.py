"""Adapters saved from a model and loaded onto another, in transformers' manner."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import adapt, shake, tokens, trainable_state
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from sparse_llama.adapters import (
    AdapterConfig,
    attach_adapters,
    disable_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
)
from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.config.sparsity import parse_sparsity
from sparse_llama.errors import CheckpointError, ConfigError

WINDOW = {"mode": "local_sliding_window", "block": 2, "num_sliding_window_blocks": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "v1": {"version": "v1"},
    "v2": {"version": "v2"},
    "top layers": {"top_layers": 2, "gate": "scalar", "gate_activation": "tanh"},
    "parts": {"scale": ["q_proj", "o_proj"], "bias": False, "norm": False, "lm_head": "bias"},
}


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_adapter_computes_the_same_on_another_copy_of_its_base(tiny_llama, tmp_path, variant):
    model = tiny_llama()
    attach_adapters(model, AdapterConfig.parse(VARIANTS[variant]))
    shake(model)
    save_adapter(model, tmp_path / "adapter", base_model="tiny")
    other = tiny_llama()
    stored = load_adapter(other, tmp_path / "adapter")
    assert stored.format == "native"
    assert stored.file.base_model.path == "tiny"
    assert torch.equal(logits(other), logits(model))
    assert not trainable_parameters(other)


def test_what_is_loaded_to_be_trained_trains(tiny_llama, tmp_path):
    save_adapter(adapt(tiny_llama(), "v2"), tmp_path, base_model="tiny")
    model = tiny_llama()
    load_adapter(model, tmp_path, is_trainable=True)
    expected = {name for name, _ in trainable_parameters(adapt(tiny_llama(), "v2"))}
    assert {name for name, _ in trainable_parameters(model)} == expected


@pytest.mark.parametrize("dense_layers", [None, (0, 3)])
def test_the_layout_goes_with_the_adapter(tiny_llama, tmp_path, dense_layers):
    model = adapt(tiny_llama(), "v1", sparsity=parse_sparsity(WINDOW), dense_layers=dense_layers)
    save_adapter(model, tmp_path, base_model="tiny")
    other, base = tiny_llama(), logits(tiny_llama())
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    dense = adapt(tiny_llama(), "v1")
    assert not torch.allclose(logits(dense), logits(model))
    with disable_adapters(other):
        torch.testing.assert_close(logits(other), base)


def test_several_adapters_live_on_one_base(tiny_llama, tmp_path):
    models = {"law": adapt(tiny_llama(), "v1"), "code": adapt(tiny_llama(), "v2", noise=0.2)}
    other = tiny_llama()
    for name, model in models.items():
        save_adapter(model, tmp_path / name, base_model="tiny")
        load_adapter(other, tmp_path / name, name=name)
    for name in ("law", "code", "law"):
        set_adapter(other, name)
        assert torch.equal(logits(other), logits(models[name]))
    save_adapter(other, tmp_path / "again", name="code", base_model="tiny")
    again = load_file(tmp_path / "again" / "adapter.safetensors")
    expected = trainable_state(models["code"])
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    set_adapter(other, {"law": 0.5, "code": 0.5})
    with pytest.raises(ConfigError, match="2 adapters are active; name one of 'law', 'code'"):
        save_adapter(other, tmp_path / "mixture")


def test_an_adapter_of_another_base_leaves_the_model_as_it_was(tiny_llama, tmp_path):
    save_adapter(adapt(tiny_llama(), "v2"), tmp_path / "good", base_model="tiny")
    save_adapter(adapt(tiny_llama(hidden_size=64), "v2"), tmp_path / "wide", base_model="wide")
    model = tiny_llama()
    with pytest.raises(CheckpointError, match=r"has shape \[3, 64\], this base needs \[3, 32\]"):
        load_adapter(model, tmp_path / "wide")
    torch.testing.assert_close(logits(model), logits(tiny_llama()))
    load_adapter(model, tmp_path / "good")
    expected = logits(model)
    with pytest.raises(CheckpointError, match="trained on another base"):
        load_adapter(model, tmp_path / "wide")
    assert torch.equal(logits(model), expected)


def test_a_base_without_a_name_has_to_be_named(tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match="name its base with base_model"):
        save_adapter(adapt(tiny_llama(), "v1"), tmp_path)


def test_a_model_loaded_from_a_folder_is_the_base_that_is_noted(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    attach_adapters(model, AdapterConfig(version="v1"))
    save_adapter(model, tmp_path / "adapter")
    assert load_adapter(model, tmp_path / "adapter").file.base_model.path == str(tmp_path / "base")


def test_nothing_there_says_what_could_be(tiny_llama, tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder; name a run's folder"):
        load_adapter(tiny_llama(), tmp_path / "runs" / "demo")
    (tmp_path / "run" / "checkpoints" / "step_000002").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"not finished .* its newest checkpoint, .*step_000002"):
        load_adapter(tiny_llama(), tmp_path / "run")


def test_another_programs_file_is_recognised(tiny_llama, tmp_path, caplog):
    """PEFT's keys, written out here; more of them, and the real library, in tests/adapters/interop."""
    prompts = torch.randn(2, 1, 3, 32, generator=torch.Generator().manual_seed(0))
    tensors: dict[str, torch.Tensor] = {}
    for layer, prompt in zip((2, 3), prompts, strict=True):
        name = f"base_model.model.model.layers.{layer}.self_attn"
        tensors |= {f"{name}.adaption_prompt": prompt, f"{name}.adaption_gate": torch.tensor([0.5 * layer])}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    document = '{"peft_type": "ADAPTION_PROMPT", "adapter_len": 3, "adapter_layers": 2}'
    (tmp_path / "adapter_config.json").write_text(document, encoding="utf-8")
    model = tiny_llama()
    stored = load_adapter(model, tmp_path)
    assert stored.format == "peft"
    expected = tiny_llama()
    attach_adapters(expected, AdapterConfig(version="v1", prompt_length=3))
    for name, parameter in trainable_parameters(expected):
        layer = int(name.split(".")[2])
        parameter.data.copy_(prompts[layer - 2, 0] if name.endswith("prompt") else torch.tensor(0.5 * layer))
    assert torch.equal(logits(model), logits(expected))


def test_a_run_folder_means_its_adapter(tiny_llama, tmp_path):
    model = adapt(tiny_llama(), "v1")
    save_adapter(model, tmp_path / "run" / "adapter", base_model="tiny")
    other = tiny_llama()
    load_adapter(other, str(Path(tmp_path / "run")))
    assert torch.equal(logits(other), logits(model))
