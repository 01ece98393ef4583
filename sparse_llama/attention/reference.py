"""The definition: softmax attention over a dense mask, statistics in fp32. Every other core has to agree.

p_ij = exp(scale q_i k_j - lse_i) where i sees j, else 0        o_i = sum_j p_ij v_j
ds_ij = p_ij (do_i v_j - delta_i)        delta_i = rowsum(do_i * o_i)
"""

from dataclasses import dataclass

import torch

from sparse_llama.attention.core import Gradients, expand_heads, statistics_dtype, sum_heads
from sparse_llama.attention.documents import Documents
from sparse_llama.attention.mask import documents_mask
from sparse_llama.layouts import Layout


@dataclass(frozen=True)
class ReferenceCore:
    """Quadratic in time and memory; for tests, short sequences and whoever doubts the fast ones."""

    layout: Layout | None
    documents: Documents
    scaling: float

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self._scores(query, key)  # (B, H, T, T)
        lse = scores.logsumexp(-1)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)  # padding sees nothing: exp(-inf - 0) = 0 everywhere
        output = (scores - lse[..., None]).exp() @ expand_heads(value, query.shape[1]).to(scores)
        return output.to(query.dtype), lse

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
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        scores = self._scores(query, key)
        probability = (scores - lse[..., None]).exp()
        upcast = grad.to(scores)
        value_scores = upcast @ expand_heads(value, num_heads).to(scores).mT
        score_grad = self.scaling * probability * (value_scores - delta[..., None])
        grad_query = score_grad @ expand_heads(key, num_heads).to(scores)
        grad_key = sum_heads(score_grad.mT @ query.to(scores), num_kv_heads)
        grad_value = sum_heads(probability.mT @ upcast, num_kv_heads)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)

    def _scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        statistics = statistics_dtype(query.dtype)
        mask = documents_mask(self.layout, query.shape[1], self.documents).to(query.device)
        scores = self.scaling * (query.to(statistics) @ expand_heads(key, query.shape[1]).to(statistics).mT)
        return scores.masked_fill(~mask, -torch.inf)
