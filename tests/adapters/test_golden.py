"""Logits and adapter gradients of other people's implementations, on the base and with the files they used.

The files hold what lit-llama, PEFT and the original LLaMA-Adapter computed in fp32. Theirs are read by our
importers; our gradients go back into their names, shapes and row order by our exporters, and must agree to
fp32 rounding.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.adapters.attach import attach_adapters, trainable_parameters
from sparse_llama.adapters.interop import ForeignAdapter, lit_llama, llama_adapter, peft, read_foreign
from sparse_llama.adapters.weights import apply_adapter

pytestmark = pytest.mark.real_data
# two fp32 implementations that add in different orders; relative L2 error of each tensor
ROUNDING = 1e-5
# the original rounds tanh(gate), and so its gradient, to fp16: 11 bits
FP16_ROUNDING = 2.0**-11
MODULES = {"lit": lit_llama, "peft": peft, "ogv": llama_adapter}


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "golden" / "adapters"


def base_model(golden: Path, name: str) -> LlamaForCausalLM:
    is_gqa = name == "peft_gqa"
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2 if is_gqa else 4,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    weights = "peft_gqa_base_hf" if is_gqa else "base_hf"
    model.load_state_dict(load_file(golden / f"{weights}.safetensors"), strict=True)
    return model.eval()


def read(golden: Path, name: str, model: LlamaForCausalLM) -> ForeignAdapter:
    file = f"{name}_adapter" if name.startswith("peft") else f"{name}_adapter.safetensors"
    return read_foreign(golden / file, model.config)


def adapt(model: LlamaForCausalLM, foreign: ForeignAdapter) -> LlamaForCausalLM:
    attach_adapters(model, foreign.settings)
    apply_adapter(model, foreign.tensors)
    return model


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, name: str, tolerance: float = ROUNDING
) -> None:
    error = (actual.detach() - expected).norm() / expected.norm()
    assert error < tolerance, f"{name}: relative error {float(error):.1e}"


def compute(model: LlamaForCausalLM, golden: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return our logits and theirs, and leave the gradients of their loss."""
    expected = np.load(golden / f"{name}.npz")
    logits = model(input_ids=torch.from_numpy(expected["input_ids"])).logits
    labels = torch.from_numpy(expected["labels"])
    labels = labels.masked_fill(labels == -1, -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    # the logits' own tolerance, on a loss of about 5 (the original's logits are off by fp16 rounding)
    assert abs(loss.item() - expected["loss"].item()) < (5e-5 if name.startswith("ogv") else 1e-5)
    loss.backward()
    return logits, torch.from_numpy(expected["logits"])


def their_gradients(model: LlamaForCausalLM, foreign: ForeignAdapter, name: str) -> dict[str, torch.Tensor]:
    """Return our gradients under their names, in their shapes and row order."""
    gradients = {
        path: parameter.grad for path, parameter in trainable_parameters(model) if parameter.grad is not None
    }
    module = MODULES[name.split("_")[0]]
    return module.to_tensors(foreign.settings, gradients, model.config)[0]


@pytest.mark.parametrize("name", ["lit_v1", "lit_v2", "peft_mha", "peft_gqa"])
def test_logits_and_every_gradient_agree(golden, name):
    """T15, T20, T22: v2's q and k scales and biases come in lit-llama's interleaved rows."""
    model = base_model(golden, name)
    foreign = read(golden, name, model)
    logits, expected = compute(adapt(model, foreign), golden, name)
    assert_close(logits, expected, "logits")
    gradients = their_gradients(model, foreign, name)
    theirs = load_file(golden / f"{name}_grads.safetensors")
    assert gradients.keys() == theirs.keys()
    for path in theirs:
        assert gradients[path].shape == theirs[path].shape
        assert_close(gradients[path], theirs[path], path)


@pytest.mark.parametrize("name", ["ogv_v1", "ogv_mm7b_text"])
def test_the_original_agrees_to_its_rounding_of_the_gate(golden, name):
    """T17: its gate acts as tanh(gate).half(); what it rounds is what we are off by."""
    model = base_model(golden, name)
    foreign = read(golden, name, model)
    logits, expected = compute(adapt(model, foreign), golden, name)
    assert_close(logits, expected, "logits", FP16_ROUNDING)
    gradients = their_gradients(model, foreign, name)
    theirs = load_file(golden / f"{name}_grads.safetensors")
    assert theirs.keys() <= gradients.keys()
    assert len(theirs) > 2
    for path in theirs:
        assert_close(gradients[path], theirs[path], path, FP16_ROUNDING)


@pytest.mark.parametrize("name", ["ogv_v1", "ogv_mm7b_text"])
def test_the_original_agrees_to_fp32_rounding_with_its_rounded_gates(golden, name):
    model = base_model(golden, name)
    foreign = read(golden, name, model)
    for path, tensor in foreign.tensors.items():
        if path.endswith("gate"):
            tensor.copy_(tensor.tanh().half().double().atanh())
    logits, expected = compute(adapt(model, foreign), golden, name)
    assert_close(logits, expected, "logits")
    gradients = their_gradients(model, foreign, name)
    for path, gradient in load_file(golden / f"{name}_grads.safetensors").items():
        # a gate's own gradient goes through .half() on its way back
        tolerance = FP16_ROUNDING if path.endswith("gate") else ROUNDING
        assert_close(gradients[path], gradient, path, tolerance)


@pytest.mark.parametrize("kind", ["adapter_scale", "adapter_bias"])
def test_lit_v2_in_the_wrong_row_order_does_not_agree(golden, kind):
    """T15: or the tests above would prove nothing about rows."""
    model = base_model(golden, "lit_v2")
    foreign = read(golden, "lit_v2", model)
    path = f"model.layers.0.self_attn.q_proj.{kind}"
    interleaved = load_file(golden / "lit_v2_adapter.safetensors")[f"transformer.h.0.attn.c_attn.{kind}"][:64]
    assert not torch.equal(interleaved, foreign.tensors[path])
    foreign.tensors[path] = interleaved
    expected = np.load(golden / "lit_v2.npz")
    with torch.no_grad():
        logits = adapt(model, foreign)(input_ids=torch.from_numpy(expected["input_ids"])).logits
    with pytest.raises(AssertionError, match="logits"):
        assert_close(logits, torch.from_numpy(expected["logits"]), "logits", 100 * ROUNDING)


def test_lit_llamas_decoding_agrees_token_by_token(golden):
    model = base_model(golden, "lit_v1")
    adapt(model, read(golden, "lit_v1", model))
    expected = np.load(golden / "lit_v1.npz")
    ids = torch.from_numpy(expected["input_ids"])[:1, :10]
    cache, steps = None, []
    with torch.no_grad():
        for token in range(10):
            output = model(input_ids=ids[:, token : token + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert_close(torch.cat(steps, dim=1), torch.from_numpy(expected["decode_logits_row0"]), "decoding")
