"""Folding v2's scales and biases into plain linear weights."""

import torch


def fold_scale_bias(
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, adapter_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fp32 weight (out, in) and bias (out,) of the plain Linear that equals scale * (W x + bias +
    adapter_bias).

    Exact but for fp32 rounding. Cast the result once, at the end: folding in bf16 would round twice.
    """
    scale = scale.float()
    shift = adapter_bias.float() if bias is None else bias.float() + adapter_bias.float()
    return weight.float() * scale[:, None], shift * scale
