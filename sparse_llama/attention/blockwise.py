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

from sparse_llama.attention.chunks import Part, Parts, Spans, cut_into_parts
from sparse_llama.attention.core import Gradients, expand_heads, statistics_dtype, sum_heads
from sparse_llama.attention.documents import Documents
from sparse_llama.attention.kernels import causal_backward, causal_forward, masked_backward, masked_forward
from sparse_llama.layouts import Layout

Heads = slice | torch.Tensor
"""Heads of one pattern, as an index; a slice where it can be, which copies nothing."""


class ChunkedLayout:
    """A layout's chunks for documents of any length, made when first asked for."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.heads = tuple(
            _as_index([head for head, own in enumerate(layout.head_patterns) if own == pattern])
            for pattern in range(len(layout.patterns))
        )
        # Documents of a data set have a few hundred different lengths; a list is some 100 KB at 1,024 tokens.
        self.parts = lru_cache(maxsize=256)(self._cut)
        self.is_causal_at = lru_cache(maxsize=4096)(layout.is_causal_at)

    def _cut(self, pattern: int, num_tokens: int) -> Parts:
        return cut_into_parts(self.layout.patterns[pattern], self.layout.block, num_tokens)


def _as_index(heads: list[int]) -> Heads:
    is_run = heads == list(range(heads[0], heads[-1] + 1))
    return slice(heads[0], heads[-1] + 1) if is_run else torch.tensor(heads)


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
        output = documents.empty_like(query)
        lse = query.new_zeros(query.shape[:-1], dtype=statistics_dtype(query.dtype))
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
        grads = tuple(documents.empty_like(tensor) for tensor in (query, key, value))
        for group in documents.groups:
            parts = self._backward(*(documents.cut(tensor, group) for tensor in saved))
            for whole, part in zip(grads, parts, strict=True):
                documents.put(whole, group, part)
        return grads[0], grads[1], grads[2]

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
        output = torch.empty_like(query)
        lse = query.new_empty(query.shape[:-1], dtype=statistics_dtype(query.dtype))
        for pattern, heads in enumerate(chunked.heads):
            q, k, v = _inputs(query, key, value, heads)
            parts = chunked.parts(pattern, query.shape[2])
            part, lse[:, heads] = _attend(q, k, v, parts, self.scaling)
            output[:, heads] = part.to(output.dtype)
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
        grad_query = torch.empty_like(query)
        # of query heads, (B, H, T, D), in the dtype that sums are made in
        grad_key, grad_value = (
            torch.empty_like(query, dtype=statistics_dtype(query.dtype)) for _ in range(2)
        )
        for pattern, heads in enumerate(chunked.heads):
            q, k, v = _inputs(query, key, value, heads)
            g, o = (tensor[:, heads].to(q.dtype) for tensor in (grad, output))
            parts = chunked.parts(pattern, query.shape[2])
            dq, dk, dv = _attend_backward(g, q, k, v, o, lse[:, heads], parts, self.scaling)
            grad_query[:, heads] = dq.to(grad_query.dtype)
            grad_key[:, heads], grad_value[:, heads] = dk, dv
        grad_key, grad_value = (sum_heads(t, key.shape[1]).to(key.dtype) for t in (grad_key, grad_value))
        return grad_query, grad_key, grad_value


def _inputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: Heads
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value of one pattern's query heads, in what the kernel computes in.

    16-bit inputs are computed in fp32: without a bf16 unit the kernel's own bf16 backward pass is 15 times
    slower (4,096 tokens, AVX2), and merging results rounded to 16 bits would round once per part.
    """
    num_heads, dtype = query.shape[1], statistics_dtype(query.dtype)
    keys, values = (expand_heads(tensor, num_heads)[:, heads].to(dtype) for tensor in (key, value))
    return query[:, heads].to(dtype), keys, values


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Parts, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and lse, (B, H, T, D) and (B, H, T), of heads that share a pattern."""
    output = torch.empty_like(query)
    lse = query.new_empty(query.shape[:-1])
    for part in parts.leaves:
        rows = slice(part.first, part.last)
        output[:, :, rows], lse[:, :, rows] = _call(query, key, value, part, scaling)
    for part in parts.shared:
        rows = slice(part.first, part.last)
        more, more_lse = _call(query, key, value, part, scaling)
        own, own_lse = output[:, :, rows], lse[:, :, rows]
        merged = torch.logaddexp(own_lse, more_lse)
        own.mul_((own_lse - merged).exp_()[..., None]).add_(more.mul_((more_lse - merged).exp_()[..., None]))
        own_lse.copy_(merged)
    return output, lse


def _call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Part, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = part.mask(query.dtype)
    keys, values = _gather(key, part.spans), _gather(value, part.spans)
    return masked_forward(query[:, :, part.first : part.last], keys, values, mask, scaling)


def _attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    parts: Parts,
    scaling: float,
) -> Gradients:
    """Return the gradients of heads that share a pattern; keys and values are those of query heads."""
    grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for part in (*parts.leaves, *parts.shared):
        mask = part.mask(query.dtype)
        keys, values = _gather(key, part.spans), _gather(value, part.spans)
        g, q, o, statistic = (t[:, :, part.first : part.last] for t in (grad, query, output, lse))
        dq, dk, dv = masked_backward(g, q, keys, values, o, statistic, mask, scaling)
        grad_query[:, :, part.first : part.last] += dq
        first = 0
        for start, end in part.spans:
            last = first + end - start
            grad_key[:, :, start:end] += dk[:, :, first:last]
            grad_value[:, :, start:end] += dv[:, :, first:last]
            first = last
    return grad_query, grad_key, grad_value


def _gather(tensor: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Return the tokens of ``spans`` of a (B, H, S, D) tensor; a view of a single span."""
    pieces = [tensor[:, :, start:end] for start, end in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
