"""Folding v2's scales and biases into plain linear weights.

    scale * (W x + bias + adapter_bias) = (scale W) x + scale (bias + adapter_bias)

Exact but for fp32 rounding. Cast the result once, at the end: folding in bf16 would round twice.
"""

import torch


def fold_weight(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Return the folded (out, in) weight alone, fp32; the two of a layer may lie in different shards.

    Without a scale it is the weight itself, in its own precision.
    """
    return weight if scale is None else weight.float() * scale.float()[:, None]


def fold_bias(
    bias: torch.Tensor | None, scale: torch.Tensor | None, adapter_bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the folded (out,) bias alone, fp32; None where neither the base nor the adapter has one.

    Args:
        bias: the base's.
    """
    parts = [part.float() for part in (bias, adapter_bias) if part is not None]
    if not parts:
        return None
    shift = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return shift if scale is None else shift * scale.float()


def head_gates(gate: torch.Tensor, num_heads: int, *, is_tanh: bool) -> torch.Tensor:
    """Return what multiplies each head's prompt attention, (H,) fp32: a shared gate spread, tanh applied."""
    effective = gate.float().tanh() if is_tanh else gate.float()
    return effective.expand(num_heads).contiguous()
