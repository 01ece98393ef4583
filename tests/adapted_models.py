"""Adapted models away from their start, where a wrong formula shows."""

import torch
from sparse_llama.attention.interface import attach_attention, plan_attention
from transformers import LlamaForCausalLM

from sparse_llama.adapters.attach import attach_adapters, trainable_parameters
from sparse_llama.config.settings import AdapterSettings


def adapt(
    model: LlamaForCausalLM,
    version: str,
    *,
    prompt_length: int = 3,
    start_layer: int = 2,
    is_trained: bool = True,
) -> LlamaForCausalLM:
    """Return ``model`` with dense attention and adapters; trained ones have every tensor away from its
    initial value."""
    plan = plan_attention(
        None, num_heads=model.config.num_attention_heads, master_length=64, seed=0, backend="auto"
    )
    attach_attention(model, plan)
    settings = AdapterSettings(version=version, prompt_length=prompt_length, start_layer=start_layer)  # type: ignore[arg-type]
    attach_adapters(model, settings, seed=1)
    if is_trained:
        generator = torch.Generator().manual_seed(3)
        for _, parameter in trainable_parameters(model):
            parameter.data += 0.4 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def tokens(num_rows: int = 2, num_tokens: int = 9, vocabulary: int = 61) -> torch.Tensor:
    return torch.randint(vocabulary, (num_rows, num_tokens), generator=torch.Generator().manual_seed(5))
