"""Sequence-parallel attention by all-to-all (DeepSpeed-Ulysses, arXiv:2309.14509, section 3): a core around a
core.

Outside attention a rank has some tokens of all heads. Inside it has all tokens of some heads, so whatever
core and layout serve one rank serve it too, documents that cross the cuts included. With fewer key/value
heads than ranks a head is sent to every rank whose query heads share it, and its gradients are added up.

Forward and backward see the local tensors only; key and value are sent a second time in the backward pass.
To keep what came in would save 4 of its 8 messages and hold 4 tensors more per layer that is not
checkpointed: the saving of memory is what ranks are for.

``B`` batch, ``T`` tokens of the whole row, ``R`` ranks, ``H`` query heads, ``K`` key/value heads, ``D`` head
width.
"""

from dataclasses import dataclass

import torch

from sparse_llama.attention.core import AttentionCore, Gradients, head_shares, heads_of_group, sum_heads
from sparse_llama.config.section import alternatives
from sparse_llama.distributed.sequence import SequenceParallel
from sparse_llama.errors import ConfigError


@dataclass(frozen=True)
class UlyssesCore:
    """``inner`` over rows that R ranks share; every rank must call it in the same order."""

    inner: AttentionCore
    """The core of this rank's heads (``own_heads``) and of the whole row's documents."""
    sequence: SequenceParallel

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's part of output and lse, (B, H, T / R, D) and (B, H, T / R).

        Args:
            query, key, value: this rank's tokens, (B, H or K, T / R, D).
        """
        output, lse = self.inner.forward(*map(self._to_heads, (query, key, value)))
        return self._to_tokens(output), self._to_tokens(lse).contiguous()

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
        """Return the gradients of this rank's tokens; see ``AttentionCore.backward``."""
        grads = self.inner.backward(
            *map(self._to_heads, (grad, query, key, value, output)),
            *(self._to_heads(statistic).contiguous() for statistic in (lse, delta)),
        )
        num_kv_heads = key.shape[1]
        grad_query, grad_key, grad_value = map(self._to_tokens, grads)
        return grad_query, sum_heads(grad_key, num_kv_heads), sum_heads(grad_value, num_kv_heads)

    def _to_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a (B, H, T / R, ...) tensor's own heads of all ranks' tokens, (B, max(1, H / R), T, ...)."""
        size = self.sequence.size
        if tensor.shape[1] < size:
            tensor = tensor.repeat_interleave(size // tensor.shape[1], dim=1)
        # Tokens before heads, as projections leave them in memory: one row of a batch needs no copy at the
        # receiver, and PyTorch's GPU kernels none of ``output``.
        parts = tensor.transpose(1, 2).unflatten(2, (size, -1))  # (B, T / R, R, H / R, ...)
        received = self.sequence.exchange(parts.movedim(2, 0))  # (R, B, T / R, H / R, ...)
        return received.transpose(0, 1).flatten(1, 2).transpose(1, 2)

    def _to_tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the own tokens of all ranks' heads, (B, H, T / R, ...), of (B, H / R, T, ...)."""
        parts = tensor.transpose(1, 2).unflatten(1, (self.sequence.size, -1))  # (B, R, T / R, H / R, ...)
        received = self.sequence.exchange(parts.transpose(0, 1))  # (R, B, T / R, H / R, ...)
        return received.movedim(0, 2).flatten(2, 3).transpose(1, 2)


def own_heads(heads: range, sequence: SequenceParallel) -> range:
    """Return which of the query ``heads`` this rank attends with, by their numbers in the layer."""
    share = len(heads) // sequence.size
    return heads[sequence.rank * share : (sequence.rank + 1) * share]


def check_heads(num_heads: int, num_kv_heads: int, size: int, *, num_groups: int = 1) -> None:
    """Refuse more or other ranks than a layer's heads can be shared out among.

    Args:
        size: R, ranks that share each row.
        num_groups: of heads that a layer attends with one after the other.

    Raises:
        ConfigError: naming the sizes that divide them.
    """
    if num_heads % num_groups:
        return  # refused where the groups are made, with their own key
    heads, kv_heads = heads_of_group(num_heads, num_kv_heads, num_groups)
    allowed = head_shares(heads, kv_heads)
    if size not in allowed:
        grouped = "" if num_groups == 1 else f" of each of {num_groups} sparse_llama.memory.head_groups"
        raise ConfigError(
            f"sequence_parallel_size: {size} ranks cannot share query heads and key/value heads{grouped} "
            f"evenly, {heads} and {kv_heads}; use {alternatives([*map(str, allowed)])}"
        )
