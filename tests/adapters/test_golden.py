"""Logits and adapter gradients of other people's implementations, on the base and with the tensors they used.

The files hold what lit-llama, PEFT and the original LLaMA-Adapter computed in fp32; ours must agree to fp32
rounding.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapted_models import adapt
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.adapters.weights import apply_adapter

pytestmark = pytest.mark.real_data
# two fp32 implementations that add in different orders; relative L2 error of each tensor
ROUNDING = 1e-5
# the original rounds tanh(gate), and so its gradient, to fp16: 11 bits
FP16_ROUNDING = 2.0**-11
HEADS, HEAD_WIDTH, WIDTH, LAYERS = 4, 16, 64, 4


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "golden" / "adapters"


def base_model(weights: Path, num_kv_heads: int = HEADS) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(weights), strict=True)
    return model.eval()


def interleaved_rows() -> torch.Tensor:
    """Return, for each row of a half-rotated q or k, the row of the interleaved layout that it is."""
    within = torch.arange(HEAD_WIDTH).view(-1, 2).T.flatten()  # 0 2 4 ... 1 3 5 ...
    return (torch.arange(HEADS)[:, None] * HEAD_WIDTH + within).flatten()


def from_lit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return lit-llama's tensors under our names and in our row order."""
    ours: dict[str, torch.Tensor] = {}
    modules = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc1": "mlp.gate_proj", "mlp.c_fc2": "mlp.up_proj"}
    modules |= {"mlp.c_proj": "mlp.down_proj"}
    norms = {"rms_1": "input_layernorm", "rms_2": "post_attention_layernorm"}
    for name, tensor in tensors.items():
        if name == "transformer.ln_f.scale":
            ours["model.norm.weight"] = tensor
            continue
        if name.startswith("lm_head."):
            ours[name] = tensor
            continue
        layer, rest = name.removeprefix("transformer.h.").split(".", 1)
        prefix, (module, kind) = f"model.layers.{layer}", rest.rsplit(".", 1)
        if kind == "gating_factor":
            ours[f"{prefix}.self_attn.zero_init.gate"] = tensor.flatten()
        elif module == "attn.adapter_wte":
            ours[f"{prefix}.self_attn.zero_init.prompt"] = tensor
        elif module == "attn.c_attn":
            query, key, value = tensor.split(WIDTH)
            ours[f"{prefix}.self_attn.q_proj.{kind}"] = query[interleaved_rows()]
            ours[f"{prefix}.self_attn.k_proj.{kind}"] = key[interleaved_rows()]
            ours[f"{prefix}.self_attn.v_proj.{kind}"] = value
        elif module in norms:
            ours[f"{prefix}.{norms[module]}.weight"] = tensor
        else:
            ours[f"{prefix}.{modules[module]}.{kind}"] = tensor
    return ours


def from_peft(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return PEFT's tensors under our names; its one gate per layer is every head's."""
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module = name.removeprefix("base_model.model.").rsplit(".", 1)[0]
        if name.endswith("adaption_gate"):
            ours[f"{module}.zero_init.gate"] = tensor.expand(HEADS).clone()
        else:
            ours[f"{module}.zero_init.prompt"] = tensor[0]
    return ours


def from_original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the original v1's tensors under our names: one embedding holds the prompts of layers 2 and 3;
    tanh gates."""
    ours: dict[str, torch.Tensor] = {}
    for layer, prompt in zip((2, 3), tensors["adapter_query.weight"].split(10), strict=True):
        gate = tensors[f"layers.{layer}.attention.gate"].flatten().tanh().half().float()
        ours[f"model.layers.{layer}.self_attn.zero_init.prompt"] = prompt
        ours[f"model.layers.{layer}.self_attn.zero_init.gate"] = gate
    return ours


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, name: str, tolerance: float = ROUNDING
) -> None:
    error = (actual.detach() - expected).norm() / expected.norm()
    assert error < tolerance, f"{name}: relative error {float(error):.1e}"


def step(model: LlamaForCausalLM, arrays: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compare logits and loss with ``arrays`` and return the gradients by name."""
    expected = np.load(arrays)
    apply_adapter(model, tensors)
    logits = model(input_ids=torch.from_numpy(expected["input_ids"])).logits
    assert_close(logits, torch.from_numpy(expected["logits"]), "logits")
    labels = torch.from_numpy(expected["labels"])
    labels = labels.masked_fill(labels == -1, -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(loss.item() - expected["loss"].item()) < 1e-5
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainable_parameters(model)}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_lit_llama_agrees(golden, version):
    """T15, T22: v2's q and k scales and biases come in lit-llama's interleaved rows."""
    model = adapt(base_model(golden / "base_hf.safetensors"), version, prompt_length=10)
    tensors = from_lit(load_file(golden / f"lit_{version}_adapter.safetensors"))
    gradients = step(model, golden / f"lit_{version}.npz", tensors)
    expected = from_lit(load_file(golden / f"lit_{version}_grads.safetensors"))
    assert gradients.keys() == expected.keys()
    for name in expected:
        assert_close(gradients[name], expected[name], name)


def test_lit_v2_in_the_wrong_row_order_does_not_agree(golden):
    """T15: or the test above would prove nothing about rows."""
    model = adapt(base_model(golden / "base_hf.safetensors"), "v2", prompt_length=10)
    tensors = from_lit(load_file(golden / "lit_v2_adapter.safetensors"))
    tensors["model.layers.0.self_attn.q_proj.adapter_scale"] = tensors[
        "model.layers.0.self_attn.q_proj.adapter_scale"
    ].flip(0)
    with pytest.raises(AssertionError, match="logits"):
        step(model, golden / "lit_v2.npz", tensors)


@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_peft_agrees(golden, heads):
    """T20: the gradient of PEFT's scalar gate is the sum of our heads'."""
    weights = "base_hf" if heads == "mha" else "peft_gqa_base_hf"
    model = adapt(
        base_model(golden / f"{weights}.safetensors", 4 if heads == "mha" else 2), "v1", prompt_length=10
    )
    tensors = from_peft(load_file(golden / f"peft_{heads}_adapter" / "adapter_model.safetensors"))
    gradients = step(model, golden / f"peft_{heads}.npz", tensors)
    for name, expected in load_file(golden / f"peft_{heads}_grads.safetensors").items():
        module = name.removeprefix("base_model.model.").rsplit(".", 1)[0]
        if name.endswith("adaption_gate"):
            assert_close(gradients[f"{module}.zero_init.gate"].sum(0, keepdim=True), expected, name)
        else:
            assert_close(gradients[f"{module}.zero_init.prompt"], expected[0], name)


def test_the_original_agrees_through_its_tanh(golden):
    """T17: its gate acts as tanh(gate), so its gradient is ours times 1 - tanh(gate)^2."""
    model = adapt(base_model(golden / "base_hf.safetensors"), "v1", prompt_length=10)
    raw = load_file(golden / "ogv_v1_adapter.safetensors")
    gradients = step(model, golden / "ogv_v1.npz", from_original(raw))
    expected = load_file(golden / "ogv_v1_grads.safetensors")
    prompts = [gradients[f"model.layers.{layer}.self_attn.zero_init.prompt"] for layer in (2, 3)]
    assert_close(torch.cat(prompts), expected["adapter_query.weight"], "prompts")
    for layer in (2, 3):
        name = f"layers.{layer}.attention.gate"
        chained = gradients[f"model.layers.{layer}.self_attn.zero_init.gate"] * (
            1 - raw[name].flatten().tanh() ** 2
        )
        assert_close(chained, expected[name].flatten(), name, FP16_ROUNDING)


def test_lit_llamas_decoding_agrees_token_by_token(golden):
    model = adapt(base_model(golden / "base_hf.safetensors"), "v1", prompt_length=10)
    apply_adapter(model, from_lit(load_file(golden / "lit_v1_adapter.safetensors")))
    expected = np.load(golden / "lit_v1.npz")
    ids = torch.from_numpy(expected["input_ids"])[:1, :10]
    cache, steps = None, []
    with torch.no_grad():
        for token in range(10):
            output = model(input_ids=ids[:, token : token + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert_close(torch.cat(steps, dim=1), torch.from_numpy(expected["decode_logits_row0"]), "decoding")
