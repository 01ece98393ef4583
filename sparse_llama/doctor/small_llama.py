"""A small LLaMA put together as a run's is: random base, sparse layout, adapter, memory settings."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.config.layers import layer_sparsities
from sparse_llama.config.settings import AdapterSettings, MemorySettings, ModelSettings, Settings
from sparse_llama.distributed.ranks import device
from sparse_llama.doctor.plain_llama import Batch
from sparse_llama.layouts import Layout
from sparse_llama.model.assemble import assemble
from sparse_llama.model.objective import TokenLoss

BLOCK = 16
NUM_TOKENS = 13 * BLOCK
DOCUMENTS = ((13 * BLOCK,), (7 * BLOCK, 6 * BLOCK))
"""Tokens of the documents in each row: one that fills it, and two that are packed."""
SPARSITY = {
    "mode": "bslongformer",
    "block": BLOCK,
    "num_sliding_window_blocks": 3,
    "global_block_indices": [0, 4],
}
_SIZES = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,  # not heads times their width: nothing may divide where it should read the other
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # enough for attention to be far from uniform
}
_NOISE = 0.2  # on what trains: at their start gates are 0, and hide a prompt's gradients


@dataclass(frozen=True)
class Variant:
    """What of a run is switched on."""

    version: Literal["v1", "v2"] = "v2"
    memory: dict[str, Any] = field(default_factory=dict)
    """Of ``sparse_llama.memory``."""
    is_checkpointed: bool = False


def build_small_llama(variant: Variant, dtype: torch.dtype) -> TokenLoss:
    """Return the model and its loss in ``dtype`` on the device of a run, ready to train."""
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(_SIZES), encoding="utf-8")
        settings = Settings(
            seq_length=NUM_TOKENS,
            model=ModelSettings(path=folder, random_weights=True),
            adapter=AdapterSettings(version=variant.version, prompt_length=5, start_layer=1),
            memory=MemorySettings(**variant.memory),
        )
        checkpointing = ActivationCheckpointing() if variant.is_checkpointed else None
        model = assemble(
            settings,
            layer_sparsities(SPARSITY),
            dtype=dtype,
            device=device(),
            checkpointing=checkpointing,
        ).model
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable_parameters(model):
        parameter.data += _NOISE * torch.randn(parameter.shape, generator=generator).to(parameter)
    if dtype == torch.float64:
        _widen_norms(model)
    return TokenLoss(model, loss_tile=settings.memory.loss_tile).train()


def draw_batch(objective: TokenLoss) -> Batch:
    """Return two rows of packed documents, three quarters of their tokens labelled."""
    config, generator = objective.llama.config, torch.Generator().manual_seed(2)
    shape = (len(DOCUMENTS), NUM_TOKENS)
    input_ids = torch.randint(config.vocab_size, shape, generator=generator)
    labels = torch.randint(config.vocab_size, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.25] = -100
    attention: Any = objective.llama.model.layers[0].self_attn
    layout = attention.attention_plan.layout(0, NUM_TOKENS)
    parts = (input_ids, position_ids(), labels, visible(layout))
    return Batch(*(part.to(device()) for part in parts))


def position_ids() -> Tensor:
    """Return the (B, T) positions of ``DOCUMENTS``."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in DOCUMENTS])


def visible(layout: Layout) -> Tensor:
    """Return which token sees which, (B, H, T, T): the drawn blocks and causality, in each document anew."""
    blocks = torch.arange(NUM_TOKENS) // layout.block
    whole = layout.dense()[:, blocks][:, :, blocks].tril()  # (H, T, T)
    sees = whole.new_zeros(len(DOCUMENTS), *whole.shape)
    for row, lengths in enumerate(DOCUMENTS):
        first = 0
        for length in lengths:
            last = first + length
            sees[row, :, first:last, first:last] = whole[:, :length, :length]
            first = last
    return sees


class _WideNorm(LlamaRMSNorm):
    """RMSNorm by its formula in the type of its input, where transformers' own rounds fp64 to fp32."""

    def __init__(self, base: LlamaRMSNorm) -> None:
        nn.Module.__init__(self)
        self.weight, self.variance_epsilon = base.weight, base.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        inverse = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden_states * inverse)


def _widen_norms(model: nn.Module) -> None:
    """Put the formula in place of transformers' norms; ours, which are to be checked, stay."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is LlamaRMSNorm:
                setattr(parent, name, _WideNorm(child))
