"""Folding v2 into plain weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_llama.adapters.merge import fold_bias, fold_weight
from sparse_llama.adapters.scale_bias import ScaleBiasLinear


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folded_layer_computes_what_the_scaled_one_does(has_bias, dtype):
    torch.manual_seed(0)
    layer = ScaleBiasLinear(nn.Linear(24, 16, bias=has_bias, dtype=dtype))
    layer.adapter_scale = nn.Parameter(torch.randn(16).to(dtype))
    layer.adapter_bias = nn.Parameter(torch.randn(16).to(dtype))
    x = torch.randn(5, 24)
    weight = fold_weight(layer.weight, layer.adapter_scale)
    bias = fold_bias(layer.bias, layer.adapter_scale, layer.adapter_bias)
    assert weight.dtype == bias.dtype == torch.float32
    torch.testing.assert_close(F.linear(x, weight, bias), layer.float()(x))


def test_a_scale_of_one_and_a_bias_of_zero_fold_to_the_same_bits():
    layer = nn.Linear(24, 16)
    weight = fold_weight(layer.weight, torch.ones(16))
    bias = fold_bias(layer.bias, torch.ones(16), torch.zeros(16))
    assert torch.equal(weight, layer.weight)
    assert torch.equal(bias, layer.bias)
