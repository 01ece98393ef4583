"""The adapter folder: what is written comes back to the bit, and what does not belong is refused in one
line."""

import json

import pytest
import torch
from adapted_models import adapt, tokens, trainable_state

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.adapters.weights import (
    AdapterFile,
    BaseModelReference,
    apply_adapter,
    read_adapter_folder,
    write_adapter_folder,
)
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import CheckpointError


def describe(**changes) -> AdapterFile:
    fields = {
        "base_model": BaseModelReference(path="bundled:tiny-llama"),
        "adapter": AdapterSettings(version="v2", prompt_length=3, start_layer=2),
        "sparse_attention": {"mode": "fixed", "block": 16, "num_local_blocks": 4},
        "master_length": 512,
        "seed": 42,
        "seq_length": 512,
        "dtype": "bfloat16",
        "trainable_parameters": 1234,
        "version": "0.1.0",
    }
    return AdapterFile(**(fields | changes))


@pytest.fixture
def saved(tiny_llama, tmp_path):
    model = adapt(tiny_llama(), "v2")
    write_adapter_folder(tmp_path / "adapter", trainable_state(model), describe())
    return tmp_path / "adapter", model


def refusal(call) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_saved_adapter_comes_back_to_the_bit(saved, tiny_llama):
    """T1: reload reproduces the logits bit for bit."""
    folder, model = saved
    config, tensors = read_adapter_folder(folder)
    assert config == describe()
    fresh = adapt(tiny_llama(), "v2", is_trained=False)
    apply_adapter(fresh, tensors)
    assert torch.equal(fresh(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_the_file_holds_fp32_whatever_it_is_given_and_no_base_weight(tiny_llama, tmp_path):
    model = adapt(tiny_llama().bfloat16(), "v1")
    flat = torch.cat([parameter.detach().flatten() for _, parameter in trainable_parameters(model)])
    views = dict(zip(("a", "b"), flat.split([flat.numel() - 4, 4]), strict=True))  # they share memory
    write_adapter_folder(tmp_path, views, describe())
    _, tensors = read_adapter_folder(tmp_path)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "a": torch.float32,
        "b": torch.float32,
    }


def test_the_configuration_is_plain_json(saved):
    document = json.loads((saved[0] / "adapter_config.json").read_text())
    assert document["format"] == "sparse-llama"
    assert document["format_version"] == 1
    assert document["adapter"]["version"] == "v2"
    assert document["sparse_attention"] == {"mode": "fixed", "block": 16, "num_local_blocks": 4}


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter_config.json"])
def test_a_missing_file_is_named(saved, name):
    (saved[0] / name).unlink()
    assert f"no {name}; an adapter folder holds" in refusal(lambda: read_adapter_folder(saved[0]))


def test_a_truncated_file_is_refused(saved):
    path = saved[0] / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a complete safetensors file" in refusal(lambda: read_adapter_folder(saved[0]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"peft_type": "ADAPTION_PROMPT"}', """"format" must be "sparse-llama", found 'ADAPTION_PROMPT'"""),
        ('{"format": "sparse-llama", "format_version": 2}', "format_version 2 is not one this version reads"),
        ('{"format": "sparse-llama", "format_version": 1, "seed": 1}', "base_model"),
    ],
)
def test_a_configuration_of_something_else_is_refused(saved, text, message):
    (saved[0] / "adapter_config.json").write_text(text)
    assert message in refusal(lambda: read_adapter_folder(saved[0]))


def test_an_adapter_of_another_base_is_refused_before_anything_is_copied(saved, tiny_llama):
    _, tensors = read_adapter_folder(saved[0])
    other = adapt(tiny_llama(intermediate_size=64), "v2", is_trained=False)
    before = trainable_state(other)
    message = refusal(lambda: apply_adapter(other, tensors, source="runs/x/adapter"))
    assert message.startswith(
        "runs/x/adapter: model.layers.0.mlp.gate_proj.adapter_scale has shape [48], this base needs [64]"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable_state(other).items())


def test_missing_and_unexpected_tensors_are_refused(saved, tiny_llama):
    """T1: strict both ways."""
    _, tensors = read_adapter_folder(saved[0])
    tensors["model.layers.9.self_attn.zero_init.gate"] = tensors.pop("lm_head.adapter_bias")
    message = refusal(lambda: apply_adapter(adapt(tiny_llama(), "v2"), tensors))
    assert (
        "1 missing (first lm_head.adapter_bias) and 1 unexpected (first "
        "model.layers.9.self_attn.zero_init.gate)" in message
    )


def test_a_v1_adapter_does_not_load_as_v2(saved, tiny_llama):
    v1 = trainable_state(adapt(tiny_llama(), "v1"))
    assert "missing" in refusal(lambda: apply_adapter(adapt(tiny_llama(), "v2"), v1))
