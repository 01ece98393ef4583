"""Folding v2's scales and biases into plain linear weights.

    scale * (W x + bias + adapter_bias) = (scale W) x + scale (bias + adapter_bias)

Exact but for fp32 rounding. Cast the result once, at the end: folding in bf16 would round twice.
"""

import torch


def fold_weight(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the folded (out, in) weight alone, fp32; the two of a layer may lie in different shards."""
    return weight.float() * scale.float()[:, None]


def fold_bias(bias: torch.Tensor | None, scale: torch.Tensor, adapter_bias: torch.Tensor) -> torch.Tensor:
    """Return the folded (out,) bias alone, fp32; ``bias`` is the base's, None where it has none."""
    shift = adapter_bias.float() if bias is None else bias.float() + adapter_bias.float()
    return shift * scale.float()
