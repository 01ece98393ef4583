"""Exact block-sparse attention on the CPU: ATen's fused kernel on the active keys of a few rows at a time.

A softmax over several parts of the keys is put together from theirs (Milakov & Gimelshein 2018,
arXiv:1805.02867, section 3.1):

    lse = logaddexp(lse_a, lse_b)        o = exp(lse_a - lse) o_a + exp(lse_b - lse) o_b

and taken apart again for free: the kernel's backward pass needs the whole's ``o`` and ``lse`` only. Time is
in proportion to the active blocks, memory to the tokens. Where the layout is causal for a document, the
kernel runs once, causally: full attention is then the same call as PyTorch's own, to the bit.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from sparse_llama.attention.chunks import Chunk, Part, Spans, cut_into_chunks
from sparse_llama.attention.core import Gradients, statistics_dtype
from sparse_llama.attention.documents import Documents
from sparse_llama.attention.kernels import causal_backward, causal_forward, masked_backward, masked_forward
from sparse_llama.layouts import Layout


class ChunkedLayout:
    """A layout's chunks for documents of any length, made when first asked for."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.heads = tuple(
            torch.tensor([h for h, own in enumerate(layout.head_patterns) if own == pattern])
            for pattern in range(len(layout.patterns))
        )
        # Documents of a data set have a few hundred different lengths; a list is some 100 KB at 1,024 tokens.
        self.chunks = lru_cache(maxsize=256)(self._cut)
        self.is_causal_at = lru_cache(maxsize=4096)(layout.is_causal_at)

    def _cut(self, pattern: int, num_tokens: int) -> tuple[Chunk, ...]:
        return cut_into_chunks(self.layout.patterns[pattern], self.layout.block, num_tokens)


@dataclass(frozen=True)
class BlockwiseCore:
    """Full (no layout) or block-sparse attention of packed documents."""

    chunked: ChunkedLayout | None
    documents: Documents
    scaling: float

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        documents = self.documents
        if documents.is_one_per_row:
            return self._forward(query, key, value)
        output = torch.empty_like(query)
        lse = query.new_empty(query.shape[:-1], dtype=statistics_dtype(query.dtype))
        for group in documents.groups:
            part, part_lse = self._forward(*(documents.cut(tensor, group) for tensor in (query, key, value)))
            documents.put(output, group, part)
            documents.put(lse, group, part_lse)
        return output, lse

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
        documents = self.documents
        saved = (grad, query, key, value, output, lse)
        if documents.is_one_per_row:
            return self._backward(*saved)
        grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        for group in documents.groups:
            parts = self._backward(*(documents.cut(tensor, group) for tensor in saved))
            for whole, part in zip(grads, parts, strict=True):
                documents.put(whole, group, part)
        return grads

    def _sparse(self, num_tokens: int) -> ChunkedLayout | None:
        """Return the layout where it is one at this length, None where attention is full."""
        chunked = self.chunked
        return None if chunked is None or chunked.is_causal_at(num_tokens) else chunked

    def _forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunked = self._sparse(query.shape[2])
        if chunked is None:
            return causal_forward(query, key, value, self.scaling)
        compute = _compute_dtype(query.dtype)
        output = torch.empty_like(query)
        lse = query.new_empty(query.shape[:-1], dtype=statistics_dtype(query.dtype))
        for pattern, heads in enumerate(chunked.heads):
            q, k, v = _heads(query, key, value, heads, compute)
            for chunk in chunked.chunks(pattern, query.shape[2]):
                rows = slice(chunk.first, chunk.last)
                part, part_lse = _attend(q[:, :, rows], k, v, chunk, self.scaling)
                output[:, heads, rows] = part.to(output.dtype)
                lse[:, heads, rows] = part_lse
        return output, lse

    def _backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> Gradients:
        chunked = self._sparse(query.shape[2])
        if chunked is None:
            return causal_backward(grad, query, key, value, output, lse, self.scaling)
        compute = _compute_dtype(query.dtype)
        groups = query.shape[1] // key.shape[1]
        grad_query = torch.empty_like(query)
        # fp32: a key's gradient is a sum over many chunks
        grad_key, grad_value = (torch.zeros_like(t, dtype=statistics_dtype(t.dtype)) for t in (key, value))
        for pattern, heads in enumerate(chunked.heads):
            q, k, v = _heads(query, key, value, heads, compute)
            g, o, statistic = grad[:, heads].to(compute), output[:, heads].to(compute), lse[:, heads]
            dk, dv = (torch.zeros_like(t, dtype=grad_key.dtype) for t in (k, v))
            for chunk in chunked.chunks(pattern, query.shape[2]):
                rows = slice(chunk.first, chunk.last)
                own = (g[:, :, rows], q[:, :, rows], o[:, :, rows], statistic[:, :, rows])
                grad_query[:, heads, rows] = _attend_backward(*own, k, v, dk, dv, chunk, self.scaling).to(
                    grad_query
                )
            grad_key.index_add_(1, heads // groups, dk)
            grad_value.index_add_(1, heads // groups, dv)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value of one pattern's query heads, in what the kernel computes in."""
    groups = query.shape[1] // key.shape[1]
    return query[:, heads].to(dtype), key[:, heads // groups].to(dtype), value[:, heads // groups].to(dtype)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunk: Chunk, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and lse of one chunk's queries."""
    output, lse = _attend_part(query, key, value, chunk.parts[0], scaling)
    for part in chunk.parts[1:]:
        other, other_lse = _attend_part(query, key, value, part, scaling)
        merged = torch.logaddexp(lse, other_lse)
        output = output * (lse - merged).exp()[..., None] + other * (other_lse - merged).exp()[..., None]
        lse = merged
    return output, lse


def _attend_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Part, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = _additive(part.mask, query.dtype)
    return masked_forward(query, _gather(key, part.spans), _gather(value, part.spans), mask, scaling)


def _attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    chunk: Chunk,
    scaling: float,
) -> torch.Tensor:
    """Return the gradient of one chunk's queries and add to those of all keys and values."""
    grad_query = torch.zeros_like(query)
    for part in chunk.parts:
        keys, values = _gather(key, part.spans), _gather(value, part.spans)
        mask = _additive(part.mask, query.dtype)
        dq, dk, dv = masked_backward(grad, query, keys, values, output, lse, mask, scaling)
        grad_query += dq
        first = 0
        for start, end in part.spans:
            last = first + end - start
            grad_key[:, :, start:end] += dk[:, :, first:last]
            grad_value[:, :, start:end] += dv[:, :, first:last]
            first = last
    return grad_query


def _gather(tensor: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Return the tokens of ``spans`` of a (B, H, S, D) tensor; a view of a single span."""
    pieces = [tensor[:, :, start:end] for start, end in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what the kernel computes in: fp32 under 16-bit inputs.

    Without a bf16 unit the kernel's own bf16 backward pass is 15 times slower than fp32's (4,096 tokens,
    AVX2), and merging parts rounded to 16 bits would round once per part.
    """
    return statistics_dtype(dtype)
