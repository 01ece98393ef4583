"""A linear layer with a trainable scale and bias per output: LLaMA-Adapter v2 (arXiv:2304.15010, section
3.1).

    y = scale * (W x + bias_base + bias)

The scale is on the output, as in lit-llama (``lit_llama/adapter_v2.py``, 2a464de, lines 30-47).
"""

import torch
import torch.nn.functional as F
from torch import nn


class ScaleBiasLinear(nn.Linear):
    """A Linear over another one's own parameters, with ``adapter_scale`` (1) and ``adapter_bias`` (0) on top.

    The weight is the same Parameter object: a tied embedding stays tied, a ZeRO-3 partition stays one, and
        the base's names
    in a state dict do not change.
    """

    def __init__(self, base: nn.Linear, *, is_rotated: bool = False) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate and initialise a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.register_parameter("adapter_scale", None)
        self.register_parameter("adapter_bias", None)

    def new_parameters(self, scale: bool, bias: bool) -> dict[str, nn.Parameter]:
        like = {"dtype": self.weight.dtype, "device": self.weight.device}
        found = {}
        if scale:
            found["adapter_scale"] = nn.Parameter(torch.ones(self.out_features, **like))
        if bias:
            found["adapter_bias"] = nn.Parameter(torch.zeros(self.out_features, **like))
        return found

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the scaled and shifted projection; equal to the base's to the bit at scale 1 and bias 0."""
        output = F.linear(input, self.weight, self.bias)
        if self.adapter_bias is not None:
            output = output + self.adapter_bias.to(output.dtype)
        if self.adapter_scale is not None:
            output = output * self.adapter_scale.to(output.dtype)
        return output
