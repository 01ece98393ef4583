"""Gates between programs: one per head or one per layer, as they are or through tanh.

``H`` query heads.
"""

from collections.abc import Mapping

import torch

from sparse_llama.adapters.interop.ours import gate_name
from sparse_llama.config.settings import AdapterSettings
from sparse_llama.errors import ExportError


def linear_gates(
    format: str, settings: AdapterSettings, tensors: Mapping[str, torch.Tensor], layers: range
) -> tuple[dict[int, torch.Tensor], tuple[str, ...]]:
    """Return, by layer, what each prompt's output is multiplied with, (H,) or (1,), and the notices."""
    gates = {layer: tensors[gate_name(layer)].detach() for layer in layers}
    if settings.gate_activation == "none":
        return gates, ()
    notice = (
        f"{format} has no tanh around its gates: tanh(gate) was written, which gives the same outputs; "
        "training on with it differs"
    )
    return {layer: gate.tanh() for layer, gate in gates.items()}, (notice,)


def tanh_gates(
    format: str, settings: AdapterSettings, tensors: Mapping[str, torch.Tensor], layers: range
) -> tuple[dict[int, torch.Tensor], tuple[str, ...]]:
    """Return, by layer, what goes through tanh before it multiplies, (H,) or (1,), and the notices.

    Raises:
        ExportError: a gate is not below 1, where tanh does not reach.
    """
    gates = {layer: tensors[gate_name(layer)].detach() for layer in layers}
    if settings.gate_activation == "tanh":
        return gates, ()
    for layer, gate in gates.items():
        largest = float(gate.abs().max())
        if not largest < 1:
            raise ExportError(
                f"--format {format}: a gate of layer {layer} is {largest:.4g}, and its gates are tanh(gate), "
                'always below 1; train with sparse_llama.adapter.gate_activation "tanh", or use another '
                "format"
            )
    notice = f"{format} puts its gates through tanh: atanh(gate) was written; training on with it differs"
    return {layer: gate.atanh() for layer, gate in gates.items()}, (notice,)
