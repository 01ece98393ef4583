"""The seam to transformers: attention under a name of ours, its core picked by layout and device.

transformers calls ``ALL_ATTENTION_FUNCTIONS[config._attn_implementation](module, q, k, v, mask, ...)`` with q
already rotated. No forward is copied and nothing is patched. A training or prefill pass gets the core that
``dispatch`` picks for the layer's layout; tokens after a cached prefix get ``decoding``'s.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM

from sparse_llama.attention.core import AttentionCore, attend
from sparse_llama.attention.decoding import DecodingCore
from sparse_llama.attention.dispatch import Backend, make_core
from sparse_llama.attention.documents import Documents, find_documents, whole_rows
from sparse_llama.attention.prepared import MasterLayout, prepare
from sparse_llama.attention.ulysses import UlyssesCore, own_heads
from sparse_llama.config.layers import LayerSparsities
from sparse_llama.config.sparsity import Sparsity
from sparse_llama.distributed.sequence import SequenceParallel
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import Layout

__all__ = ["AttentionCore", "AttentionPlan", "attach_attention", "attention_core", "plan_attention"]

ATTENTION_NAME = "block_sparse"


@dataclass(eq=False)
class AttentionPlan:
    """How a model attends; every layer points to it."""

    layers: tuple[MasterLayout | None, ...]
    """The layout of each layer, one object for all that share it; None is full causal attention."""
    backend: Backend = "auto"
    sequence: SequenceParallel | None = None
    """The ranks that share each row among them; None where a row is one rank's."""
    # All layers of a forward pass ask about the same batch: the last answer is kept, not one per layer.
    _documents: tuple[torch.Tensor, int, int, SequenceParallel | None, Documents] | None = field(
        default=None, repr=False
    )

    @property
    def masters(self) -> tuple[MasterLayout, ...]:
        """The distinct layouts."""
        return tuple(dict.fromkeys(layer for layer in self.layers if layer is not None))

    def sparsities(self) -> LayerSparsities:
        """Return the layouts as configuration, from which ``plan_attention`` makes this plan again."""
        if len(set(self.layers)) == 1:
            first = self.layers[0]
            return LayerSparsities(None if first is None else first.sparsity)
        return LayerSparsities(
            None,
            tuple(
                (tuple(i for i, layer in enumerate(self.layers) if layer is master), master.sparsity)
                for master in self.masters
            ),
        )

    def is_sparse_at(self, num_tokens: int) -> bool:
        """Return whether any layer leaves out a pair of tokens of a document of this length."""
        return any(not prepare(master.at(num_tokens)).is_causal_at(num_tokens) for master in self.masters)

    def density_at(self, num_tokens: int) -> float:
        """Return the share of the causal token pairs that attend, averaged over layers and heads."""
        density = {master: master.at(num_tokens).density_at(num_tokens) for master in self.masters}
        return sum(1.0 if layer is None else density[layer] for layer in self.layers) / len(self.layers)

    def max_tokens(self) -> int | None:
        """Return the length of the longest sequence; None where nothing limits it."""
        return min((m.layout.num_tokens for m in self.masters if not m.can_grow), default=None)

    def layout(self, layer: int, num_tokens: int) -> Layout | None:
        """Return a layer's layout for documents of up to ``num_tokens``."""
        master = self.layers[layer]
        return None if master is None else master.at(num_tokens)

    def documents(self, position_ids: torch.Tensor | None, num_rows: int, num_tokens: int) -> Documents:
        """Return the documents of a batch, over the whole rows where ranks share them."""
        if position_ids is None:
            assert self.sequence is None, "where a rank's tokens lie in a row is in their positions"
            return whole_rows(num_rows, num_tokens)
        if position_ids.is_inference():  # such tensors do not say whether they were written to
            return self._find_documents(position_ids, num_rows)
        key = (num_rows, position_ids._version, self.sequence)
        if self._documents is not None and self._documents[0] is position_ids and self._documents[1:4] == key:
            return self._documents[4]
        documents = self._find_documents(position_ids, num_rows)
        self._documents = (position_ids, *key, documents)
        return documents

    def remember(self, position_ids: torch.Tensor, documents: Documents) -> None:
        """Answer for ``position_ids`` with ``documents``, unread: fake tensors hold no positions."""
        key = (documents.num_rows, position_ids._version, self.sequence)
        self._documents = (position_ids, *key, documents)

    def _find_documents(self, position_ids: torch.Tensor, num_rows: int) -> Documents:
        if self.sequence is not None:  # 8 bytes a token: nothing beside the heads that follow
            position_ids = self.sequence.gather_tokens(position_ids)
        return find_documents(position_ids, num_rows)

    @contextmanager
    def each_rank_alone(self) -> Iterator[None]:
        """Within it the rows are whole sequences of every rank, as in generation, whatever is shared
        outside."""
        sequence, self.sequence = self.sequence, None
        try:
            yield
        finally:
            self.sequence = sequence


def plan_attention(
    sparsities: Sequence[Sparsity | None],
    *,
    num_heads: int,
    master_length: int,
    seed: int,
    backend: Backend = "auto",
    sequence: SequenceParallel | None = None,
) -> AttentionPlan:
    """Return the plan of a model; layers of equal sparsity share a master layout of ``master_length`` tokens.

    Args:
        sparsities: of every layer; None is full causal attention.
        seed: of random blocks.
        sequence: the ranks that share each row.
    """
    masters = {
        sparsity: MasterLayout(sparsity, num_heads=num_heads, num_tokens=master_length, seed=seed)
        for sparsity in dict.fromkeys(sparsities)
        if sparsity is not None
    }
    layers = tuple(None if one is None else masters[one] for one in sparsities)
    return AttentionPlan(layers, backend, sequence)


def attach_attention(model: LlamaForCausalLM, plan: AttentionPlan) -> None:
    """Make every layer of ``model`` attend by ``plan``.

    Raises:
        ConfigError: the model wants dropout on attention, which no core has.
    """
    if model.config.attention_dropout:
        raise ConfigError(
            f"config.json: attention_dropout is {model.config.attention_dropout}; only 0 is supported"
        )
    AttentionInterface.register(ATTENTION_NAME, attend_by_plan)
    AttentionMaskInterface.register(ATTENTION_NAME, refuse_padding)
    for layer in model.model.layers:
        attention: Any = layer.self_attn
        attention.attention_plan = plan
    model.set_attn_implementation(ATTENTION_NAME)


def attend_by_plan(
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
    return attend(core, query, key, value).transpose(1, 2).contiguous(), None


def refuse_padding(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Return no mask: documents come from ``position_ids``, causality and layout from the core.

    Padding at the end of a row needs none either: no token before it sees it.

    Raises:
        ConfigError: a mask that hides tokens before others. Left padding would shift a sequence against its
            layout.
    """
    if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ConfigError(
            "attention_mask: hides tokens before others, but sequences start at position 0 here and are told "
            "apart by position_ids; pad on the right, batch prompts of equal length, or one at a time"
        )


def attention_core(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    position_ids: torch.Tensor | None,
    scaling: float,
    heads: range | None = None,
) -> AttentionCore:
    """Return the core for one call of one layer.

    Args:
        module: the LlamaAttention, which points to its plan.
        position_ids: (B, T) or (1, T), 0 where a document starts; None is one document a row. Where ranks
            share the rows, all of this is of the rank's own tokens.
        heads: the layer's query heads that ``query`` holds, by which a layout knows them; None is all.
    """
    plan: AttentionPlan = module.attention_plan  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    num_rows, num_heads, num_tokens, _ = query.shape
    if key.shape[2] > num_tokens:
        return DecodingCore(plan.layout(layer, key.shape[2]), scaling)
    documents = plan.documents(position_ids, num_rows, num_tokens)
    layout = plan.layout(layer, documents.longest)
    if plan.sequence is not None:
        heads = own_heads(range(num_heads) if heads is None else heads, plan.sequence)
    if layout is not None and heads is not None:
        layout = layout.for_heads(heads)
    core = make_core(layout, documents, query, scaling=scaling, backend=plan.backend)
    return core if plan.sequence is None else UlyssesCore(core, plan.sequence)
