"""Zero-initialised gated attention over a learned prompt: LLaMA-Adapter v1 (arXiv:2303.16199, section 3.2).

Per adapted layer a prompt of P tokens and one gate per query head. With K_p, V_p = the layer's own key and
value projections of the prompt, neither normalised nor rotated,

    y_h = core_h(q, k, v) + g_h * softmax(q_h K_p^T * scale) V_p        (two softmaxes, every query sees P)

The paper's one softmax over prompt and tokens with rescaled halves is these two. Its g_h = tanh(gate_h) is
an option; the default, g_h = gate_h, is lit-llama's (``lit_llama/adapter.py``, 2a464de, lines 151-167). One
gate for all heads of a layer is an option too: PEFT's ``adaption_prompt``.

``B`` batch, ``T`` tokens, ``C`` model width, ``H`` query heads, ``K`` key/value heads, ``D`` head width,
``P`` prompt tokens.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparse_llama.attention.core import attend, row_products, statistics_dtype, token_slices
from sparse_llama.attention.interface import AttentionCore, attention_core

ATTENTION_NAME = "zero_init"
GateActivation = Literal["none", "tanh"]
_CORE_NAME = "block_sparse"  # what layers without a prompt keep, and whose mask function serves both


class ZeroInitAttention(nn.Module):
    """A layer's prompt and gates, and the whole prompted attention of that layer.

    The attention is computed here, not in the function that transformers calls, so that ZeRO-3, which gathers
    a module's parameters around that module's ``forward``, has them whole while they are used; no parameter
    leaves this module.
    """

    prompt: nn.Parameter | None  # (P, C)
    gate: nn.Parameter | None  # (H,), (1,) for all heads, or (segments, H)

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.register_parameter("prompt", None)
        self.register_parameter("gate", None)
        self.gate_activation: GateActivation = "none"
        self.segments: tuple[int, ...] = ()
        """Of a mixture: the lengths of the prompts, each of which has a softmax and a row of gates."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        attention: nn.Module,
        position_ids: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Return the (B, H, T, D) sum of the layer's attention core and the gated prompt attention.

        Args:
            attention: the LlamaAttention that owns this module; by keyword, where ZeRO-3's hooks look for no
                tensors.
        """
        core = attention_core(attention, query, key, position_ids, scaling)
        if self.prompt is None:
            return attend(core, query, key, value)
        keys, values = self.prompt_keys_values(attention)
        gates = self.gates()
        if self.segments:
            output, _ = core.forward(query, key, value)
            lengths = self.segments
            for one_key, one_value, gate in zip(
                keys.split(lengths, 1), values.split(lengths, 1), gates, strict=True
            ):
                probability = prompt_probability(query, one_key, scaling)
                output = output + prompt_output(probability, one_value, gate, query.dtype)
            return output
        return _PromptedAttention.apply(core, query, key, value, keys, values, gates, scaling)

    def gates(self) -> torch.Tensor:
        """Return what multiplies each head's prompt attention, (H,), or (segments, H)."""
        assert self.gate is not None
        gate = self.gate.tanh() if self.gate_activation == "tanh" else self.gate
        return gate.expand(*gate.shape[:-1], self.num_heads)

    def prompt_keys_values(self, attention: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K_p and V_p, each (K, P, D), made anew: a cache would cut the prompt off from its
        gradient."""
        assert self.prompt is not None
        layer: Any = attention
        prompt, head_dim = self.prompt.to(layer.k_proj.weight.dtype), layer.head_dim
        keys, values = layer.k_proj(prompt), layer.v_proj(prompt)
        return (
            keys.view(keys.shape[0], -1, head_dim).transpose(0, 1),
            values.view(values.shape[0], -1, head_dim).transpose(0, 1),
        )


def register_zero_init_attention() -> None:
    """Make ``zero_init`` known to transformers, with the mask function of ``block_sparse``; idempotent."""
    AttentionInterface.register(ATTENTION_NAME, zero_init_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, ALL_MASK_ATTENTION_FUNCTIONS[_CORE_NAME])


def zero_init_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the (B, T, H, D) attention output of an adapted or plain layer; transformers' attention
    interface.

    Args:
        query: (B, H, T, D), rotated.
        key, value: (B, K, S, D); the queries are the last T of the S positions.
    """
    prompted = getattr(module, "zero_init", None)
    if prompted is None:
        plain = ALL_ATTENTION_FUNCTIONS[_CORE_NAME]
        return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    position_ids = kwargs.get("position_ids")
    output = prompted(query, key, value, attention=module, position_ids=position_ids, scaling=scaling)
    return output.transpose(1, 2).contiguous(), None


class _PromptedAttention(torch.autograd.Function):
    """The core and the prompt attention as one node, so that only their sum is kept for the backward pass.

    What the core's backward needs of its own output comes back as the sum minus the prompt part, and
    rowsum(do * o) = rowsum(do * sum) - sum_j p_j dp_j, where p_j and dp_j are at hand for the prompt's
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        core: AttentionCore,
        query: torch.Tensor,  # (B, H, T, D)
        key: torch.Tensor,  # (B, K, S, D)
        value: torch.Tensor,
        prompt_key: torch.Tensor,  # (K, P, D)
        prompt_value: torch.Tensor,
        gate: torch.Tensor,  # (H,)
        scaling: float,
    ) -> torch.Tensor:
        total, lse = core.forward(query, key, value)
        for tokens in token_slices(query.shape[2]):
            probability = prompt_probability(query[:, :, tokens], prompt_key, scaling)
            total[:, :, tokens] += prompt_output(probability, prompt_value, gate, query.dtype)
        ctx.core, ctx.scaling = core, scaling
        ctx.save_for_backward(query, key, value, total, lse, prompt_key, prompt_value, gate)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, total, lse, prompt_key, prompt_value, gate = ctx.saved_tensors
        # Alive beside these at the core's backward pass: output, delta and the prompt's part of the query's
        # gradient; the rest exists for a slice of tokens.
        output, grad_of_query = torch.empty_like(total), torch.empty_like(query)
        delta = row_products(grad, total)
        sums: tuple[torch.Tensor, ...] = tuple(
            torch.zeros_like(one, dtype=statistics_dtype(one.dtype))
            for one in (prompt_key, prompt_value, gate)
        )
        for tokens in token_slices(query.shape[2]):
            probability = prompt_probability(query[:, :, tokens], prompt_key, ctx.scaling)  # (B, K, G, t, P)
            own = prompt_output(probability, prompt_value, gate, query.dtype)
            torch.sub(total[:, :, tokens], own, out=output[:, :, tokens])
            prompt = prompt_gradients(
                grad[:, :, tokens],
                query[:, :, tokens],
                prompt_key,
                prompt_value,
                gate,
                probability=probability,
                scaling=ctx.scaling,
            )
            grad_of_query[:, :, tokens] = prompt.query
            delta[:, :, tokens] -= prompt.row_sum
            for total_sum, part in zip(sums, (prompt.key, prompt.value, prompt.gate), strict=True):
                total_sum += part
        del total  # under a checkpoint the last reference: one (T, C) less for the core
        grad_query, grad_key, grad_value = ctx.core.backward(grad, query, key, value, output, lse, delta)
        grad_of_query += grad_query
        of_prompt = (
            one.to(like.dtype) for one, like in zip(sums, (prompt_key, prompt_value, gate), strict=True)
        )
        return None, grad_of_query, grad_key, grad_value, *of_prompt, None


class PromptGradients(NamedTuple):
    """Gradients of a prompt's attention."""

    query: torch.Tensor  # (B, H, T, D)
    key: torch.Tensor  # (K, P, D)
    value: torch.Tensor  # (K, P, D)
    gate: torch.Tensor  # (H,), in the statistics' type
    row_sum: torch.Tensor
    """(B, H, T) rowsum(grad * gated prompt attention)."""


def prompt_gradients(
    grad: torch.Tensor,
    query: torch.Tensor,
    prompt_key: torch.Tensor,
    prompt_value: torch.Tensor,
    gate: torch.Tensor,
    *,
    probability: torch.Tensor,
    scaling: float,
) -> PromptGradients:
    """Return the gradients of ``prompt_output(prompt_probability(...))``.

    Args:
        grad, query: (B, H, T, D).
        prompt_key, prompt_value: (K, P, D).
        gate: (H,).
        probability: what ``prompt_probability`` returned.
    """
    num_kv_heads = prompt_key.shape[0]
    grouped_grad, grouped_query = _group(grad, num_kv_heads), _group(query, num_kv_heads)
    grouped_gate = gate.to(probability.dtype).view(num_kv_heads, -1, 1, 1)  # (K, G, 1, 1)
    ungated = torch.einsum("bkgtd,kpd->bkgtp", grouped_grad, prompt_value).to(probability.dtype)
    row_sum = (probability * ungated).sum(-1, keepdim=True)  # (B, K, G, T, 1), without the gate
    score_grad = (grouped_gate * scaling * probability * (ungated - row_sum)).to(query.dtype)
    gated = (grouped_gate * probability).to(query.dtype)
    return PromptGradients(
        query=torch.einsum("bkgtp,kpd->bkgtd", score_grad, prompt_key).flatten(1, 2),
        key=torch.einsum("bkgtp,bkgtd->kpd", score_grad, grouped_query),
        value=torch.einsum("bkgtp,bkgtd->kpd", gated, grouped_grad),
        gate=row_sum.sum((0, 3, 4)).flatten(),
        row_sum=(grouped_gate * row_sum).flatten(1, 2).squeeze(-1),
    )


def _group(tensor: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Return (B, H, T, D) as (B, K, G, T, D): the G query heads that share a key/value head, side by side."""
    return tensor.unflatten(1, (num_kv_heads, -1))


def prompt_probability(query: torch.Tensor, prompt_key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the (B, K, G, T, P) softmax over the prompt."""
    scores = torch.einsum("bkgtd,kpd->bkgtp", _group(query, prompt_key.shape[0]), prompt_key)
    return (scores.to(statistics_dtype(query.dtype)) * scaling).softmax(-1)


def prompt_output(
    probability: torch.Tensor, prompt_value: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the gated prompt attention, (B, H, T, D); exactly zero at gate 0."""
    gated = (probability * gate.to(probability.dtype).view(prompt_value.shape[0], -1, 1, 1)).to(dtype)
    return torch.einsum("bkgtp,kpd->bkgtd", gated, prompt_value).flatten(1, 2)
