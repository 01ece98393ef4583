"""The seam to transformers: attention under a name of ours, its core picked by layout and device.

transformers calls ``ALL_ATTENTION_FUNCTIONS[config._attn_implementation](module, q, k, v, mask, ...)`` with q
already rotated. No forward is copied and nothing is patched. Which core computes:

    full causal             PyTorch's own kernels, the numbers of plain LLaMA
    block-sparse, CPU       ``blockwise``
    block-sparse, CUDA      ``flex``
    a step of decoding      PyTorch's kernels under the mask's last rows: the training row, to rounding
"""

import logging
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM

from sparse_llama.attention.blockwise import BlockwiseCore, ChunkedLayout
from sparse_llama.attention.core import (
    AttentionCore,
    CoreAttention,
    Gradients,
    expand_heads,
    statistics_dtype,
)
from sparse_llama.attention.documents import Documents, find_documents, whole_rows
from sparse_llama.attention.mask import rows_mask
from sparse_llama.attention.reference import ReferenceCore
from sparse_llama.config.sparsity import Sparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import Layout, build_layout

__all__ = ["AttentionCore", "AttentionPlan", "attach_attention", "attention_core", "plan_attention"]

ATTENTION_NAME = "block_sparse"
Backend = Literal["auto", "reference", "blockwise", "flex"]
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class AttentionPlan:
    """How a model attends; every layer points to it."""

    layout: Layout | None
    """None is full causal attention."""
    backend: Backend
    chunked: ChunkedLayout | None = None
    # All layers of a forward pass ask about the same batch: the last answers are kept, not one per layer.
    _documents: tuple[torch.Tensor, int, int, Documents] | None = field(default=None, repr=False)
    _mask: tuple[Documents, torch.device, Any] | None = field(default=None, repr=False)

    def layout_at(self, num_tokens: int) -> Layout | None:
        """Return the layout where it is one for a document of this length, None where attention is full."""
        is_full = self.layout is None or self.chunked is None or self.chunked.is_causal_at(num_tokens)
        return None if is_full else self.layout

    def documents(self, position_ids: torch.Tensor | None, num_rows: int, num_tokens: int) -> Documents:
        """Return the documents of a batch."""
        if position_ids is None:
            return whole_rows(num_rows, num_tokens)
        if position_ids.is_inference():  # such tensors do not say whether they were written to
            return find_documents(position_ids, num_rows)
        if self._documents is not None:
            positions, version, rows, documents = self._documents
            if positions is position_ids and version == position_ids._version and rows == num_rows:
                return documents
        documents = find_documents(position_ids, num_rows)
        self._documents = (position_ids, position_ids._version, num_rows, documents)
        return documents

    def flex_core(self, documents: Documents, device: torch.device, scaling: float) -> AttentionCore:
        """Return FlexAttention over a batch's documents."""
        # seconds to import, and only GPUs need it
        from sparse_llama.attention.flex import FlexCore, block_mask

        assert self.layout is not None
        if self._mask is None or self._mask[0] is not documents or self._mask[1] != device:
            self._mask = (documents, device, block_mask(self.layout, documents, device))
        return FlexCore(self._mask[2], scaling)


def plan_attention(
    sparsity: Sparsity | None, *, num_heads: int, master_length: int, seed: int, backend: Backend
) -> AttentionPlan:
    """Return the plan of a model: the master layout of ``master_length`` tokens, made once.

    Args:
        sparsity: None is full causal attention.
        seed: of random blocks.
    """
    if sparsity is None:
        return AttentionPlan(None, backend)
    num_blocks = -(-master_length // sparsity.block)
    layout = build_layout(sparsity, num_heads=num_heads, num_blocks=num_blocks, seed=seed)
    return AttentionPlan(layout, backend, ChunkedLayout(layout))


def attach_attention(model: LlamaForCausalLM, plan: AttentionPlan) -> None:
    """Make every layer of ``model`` attend by ``plan``.

    Raises:
        ConfigError: the model wants dropout on attention, which no core has.
    """
    if model.config.attention_dropout:
        raise ConfigError(
            f"config.json: attention_dropout is {model.config.attention_dropout}; only 0 is supported"
        )
    AttentionInterface.register(ATTENTION_NAME, block_sparse_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, refuse_padding)
    for layer in model.model.layers:
        attention: Any = layer.self_attn
        attention.attention_plan = plan
    model.set_attn_implementation(ATTENTION_NAME)


def block_sparse_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the (B, T, H, D) attention output; transformers' attention interface.

    Args:
        query: (B, H, T, D), rotated.
        key, value: (B, K, S, D); the queries are the last T of the S positions.
    """
    core = attention_core(module, query, key, kwargs.get("position_ids"), scaling)
    output: torch.Tensor = CoreAttention.apply(core, query, key, value)
    return output.transpose(1, 2).contiguous(), None


def refuse_padding(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Return no mask: documents come from ``position_ids``, causality and layout from the core.

    Raises:
        ConfigError: a mask that hides tokens. Left padding would shift a sequence against its layout.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ConfigError(
            "attention_mask: hides tokens, but sequences start at position 0 here and are told apart by "
            "position_ids; batch prompts of equal length, or one at a time"
        )


def attention_core(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    position_ids: torch.Tensor | None,
    scaling: float,
) -> AttentionCore:
    """Return the core for one call of one layer.

    Args:
        module: the LlamaAttention, which points to its plan.
        position_ids: (B, T) or (1, T), 0 where a document starts; None is one document a row.
    """
    plan: AttentionPlan = module.attention_plan  # type: ignore[assignment]
    num_rows, _, num_tokens, _ = query.shape
    if key.shape[2] > num_tokens:
        return DecodingCore(plan, scaling)
    documents = plan.documents(position_ids, num_rows, num_tokens)
    # A document shorter than the longest may still be causal under the layout: the cores know.
    layout = plan.layout_at(max(group.num_tokens for group in documents.groups))
    if plan.backend == "reference":
        return ReferenceCore(layout, documents, scaling)
    is_cpu = query.device.type == "cpu"
    if layout is None or (is_cpu and plan.backend != "flex"):
        return BlockwiseCore(None if layout is None else plan.chunked, documents, scaling)
    if plan.backend == "blockwise":
        _say_once("sparse_llama.attention.backend: blockwise is for the CPU; flex computes the same here")
    return plan.flex_core(documents, query.device, scaling)


@dataclass(frozen=True)
class DecodingCore:
    """Attention of the last tokens of one document per row to everything cached before them."""

    plan: AttentionPlan
    scaling: float

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_heads, num_tokens, last = query.shape[1], query.shape[2], key.shape[2]
        layout = self.plan.layout_at(last)
        mask = None
        if num_tokens > 1 or layout is not None:
            mask = rows_mask(layout, num_heads, last - num_tokens, last).to(query.device)  # (H, T, S)
        key, value = expand_heads(key, num_heads), expand_heads(value, num_heads)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        # No one asks for the lse of a decoding step: it is for a backward pass.
        return output, query.new_zeros(query.shape[:-1], dtype=statistics_dtype(query.dtype))

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
    ) -> Gradients:
        raise ConfigError("use_cache: a cached prefix has no gradient; train with use_cache=False")


@lru_cache(maxsize=16)
def _say_once(message: str) -> None:
    logger.warning(message)
