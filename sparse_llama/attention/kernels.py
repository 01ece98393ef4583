"""PyTorch's fused attention kernels, forward and backward apart, with the log-sum-exp at hand.

``torch.nn.functional.scaled_dot_product_attention`` hides the lse, which merging partial softmaxes and
saving one sum for the adapter need; these are the ATen operations it calls, so the numbers are its own.
"""

from typing import Any

import torch
import torch.nn.functional as F

from sparse_llama.attention.core import Gradients, expand_heads, statistics_dtype, sum_heads

aten: Any = torch.ops.aten


def has_flash(query: torch.Tensor) -> bool:
    """Return whether the GPU's flash kernel takes these heads; autograd picks a kernel for others."""
    head_dim = query.shape[-1]
    return query.dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def causal_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (B, H, T, D) and the lse (B, H, T) of full causal attention."""
    if query.device.type == "cpu":
        key, value = (expand_heads(tensor, query.shape[1]) for tensor in (key, value))
        return masked_forward(query, key, value, None, scaling, is_causal=True)
    if has_flash(query):
        result = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scaling)
        return result[0], result[1]
    output = _autograd_causal(query, key, value, scaling)
    # Not needed by this device's backward pass, which runs the forward pass again.
    return output, query.new_zeros(query.shape[:-1], dtype=statistics_dtype(query.dtype))


def causal_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
) -> Gradients:
    """Return the gradients of ``causal_forward``."""
    if query.device.type == "cpu":
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        key, value = expand_heads(key, num_heads), expand_heads(value, num_heads)
        grads = masked_backward(grad, query, key, value, output, lse, None, scaling, is_causal=True)
        return grads[0], sum_heads(grads[1], num_kv_heads), sum_heads(grads[2], num_kv_heads)
    if has_flash(query):
        length = query.shape[2]
        no_seed = torch.zeros((), dtype=torch.uint64, device=query.device)  # read by dropout alone
        return aten._scaled_dot_product_flash_attention_backward(
            *(grad, query, key, value, output, lse, None, None, length, length, 0.0, True, no_seed, no_seed),
            scale=scaling,
        )
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        again = _autograd_causal(inputs[0], inputs[1], inputs[2], scaling)
    grad_query, grad_key, grad_value = torch.autograd.grad(again, inputs, grad)
    return grad_query, grad_key, grad_value


def masked_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    *,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and lse on the CPU.

    Args:
        key, value: (B, H, S, D), expanded to the query heads.
        mask: additive, (T, S) in the query's dtype; None is everything, or what ``is_causal`` leaves.
    """
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scaling
    )


def masked_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    *,
    is_causal: bool = False,
) -> Gradients:
    """Return the gradients on the CPU.

    ``output`` and ``lse`` may be those of a softmax over more keys than ``key``: the gradient of a part is a
    function of the whole's statistics alone.
    """
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, output, lse, 0.0, is_causal, attn_mask=mask, scale=scaling
    )


def _autograd_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return full causal attention where no kernel returns an lse: fp32 on a GPU, odd head widths."""
    key, value = (expand_heads(tensor, query.shape[1]) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
