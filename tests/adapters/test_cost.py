"""What v2 costs beside v1, counted: bytes kept for a backward pass, operations of a step, layers it reaches.

``B`` batch, ``T`` tokens, ``C`` model width, ``F`` the MLP's, ``H`` query heads, ``K`` key/value heads, ``D``
head width, ``P`` prompt tokens.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted_models import adapt, tokens
from saved_tensors import kept_for_backward, num_bytes
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from sparse_llama.adapters.attach import attach_adapters, first_trained_layer
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.memory.checkpointing import checkpoint_layers

B, T, C, F, H, K, D, P = 2, 40, 64, 172, 4, 2, 16, 3
SHAPE: dict[str, Any] = {
    "hidden_size": C,
    "intermediate_size": F,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": D,
}
MakeLlama = Callable[..., LlamaForCausalLM]


def forward(model: LlamaForCausalLM) -> torch.Tensor:
    """Return the last hidden states: what head and loss keep is the same in both versions."""
    return model.model(input_ids=tokens(B, T), use_cache=False).last_hidden_state


def kept_bytes(model: LlamaForCausalLM) -> int:
    return num_bytes(kept_for_backward(lambda: forward(model.train()), model))


def step_operations(model: LlamaForCausalLM) -> int:
    with FlopCounterMode(display=False) as counter:
        forward(model.train()).sum().backward()
    return counter.get_total_flops()


def per_layer(measure: Callable[[LlamaForCausalLM], int], make: Callable[[int], LlamaForCausalLM]) -> float:
    """Return what a layer in the middle costs: embedding, head and the first layer's ends cancel out."""
    return (measure(make(4)) - measure(make(2))) / 2


def adapted(
    tiny_llama: MakeLlama, version: str, dtype: torch.dtype = torch.float32
) -> Callable[[int], LlamaForCausalLM]:
    def make(num_layers: int) -> LlamaForCausalLM:
        base = tiny_llama(**SHAPE, num_hidden_layers=num_layers)
        base.to(dtype)  # type: ignore[arg-type]
        return adapt(base, version, prompt_length=P, start_layer=0)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_v2_keeps_no_byte_more_than_v1(tiny_llama, dtype):
    v1, v2 = (adapted(tiny_llama, version, dtype) for version in ("v1", "v2"))
    assert per_layer(kept_bytes, v2) <= per_layer(kept_bytes, v1)
    assert kept_bytes(v2(4)) <= kept_bytes(v1(4))


def test_what_v2_keeps_of_a_token_is_what_the_derivation_says(tiny_llama):
    """fp32: both norms' inputs, q, k, v, attention's output and its lse; o's and down's outputs; g and u.

    v1 has silu(g) and both norms' 1 / rms in place of the two outputs.
    """
    attention = 2 * C + 2 * H * D + 2 * K * D + H
    prompt = P * (2 * K * D)
    expected = {"v1": attention + 3 * F + 2, "v2": attention + 2 * F + 2 * C}
    for version, numbers in expected.items():
        kept = per_layer(kept_bytes, adapted(tiny_llama, version)) / 4
        assert kept == B * T * numbers + prompt, version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_v2_is_a_step_of_v1_and_in_fp32_the_rotated_products_once_more(tiny_llama, dtype):
    """q and k of the tokens, k of the prompt; 16 bits keep their outputs."""
    v1, v2 = (per_layer(step_operations, adapted(tiny_llama, version, dtype)) for version in ("v1", "v2"))
    again = 2 * B * T * C * (H * D + K * D) + 2 * P * C * K * D
    assert v2 - v1 == (again if dtype == torch.float32 else 0)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_inference_has_the_operations_of_the_base(tiny_llama, version):
    def count(model: LlamaForCausalLM) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward(model)
        return counter.get_total_flops()

    base = adapt(tiny_llama(**SHAPE), "v1", prompt_length=P, start_layer=3)
    model = adapt(tiny_llama(**SHAPE), version, prompt_length=P, start_layer=3)
    assert count(model) == count(base)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_layers_below_the_top_ones_run_forward_only_and_keep_nothing(tiny_llama, version, is_checkpointed):
    """``top_layers``: two more layers below cost their forward pass, once, and not a byte."""

    def make(num_layers: int) -> LlamaForCausalLM:
        model = tiny_llama(**SHAPE, num_hidden_layers=num_layers)
        attach_adapters(model, AdapterSettings(version=version, top_layers=2, prompt_length=P))  # type: ignore[arg-type]
        settings = ActivationCheckpointing() if is_checkpointed else None
        checkpoint_layers(model, settings, first_trained_layer(model))
        return model

    def forward_operations(model: LlamaForCausalLM) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward(model)
        return counter.get_total_flops()

    assert first_trained_layer(make(6)) == 4
    assert kept_bytes(make(6)) == kept_bytes(make(4)) > 0
    below = forward_operations(make(6)) - forward_operations(make(4))
    assert step_operations(make(6)) - step_operations(make(4)) == below > 0
