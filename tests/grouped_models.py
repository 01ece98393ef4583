"""Adapted models with and without head groups, of which everything else is equal, and their gradients."""

from collections.abc import Callable
from typing import Any

import torch
from adapted_models import adapt
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.config.settings import MemorySettings
from sparse_llama.memory.head_groups import group_heads

Make = Callable[..., LlamaForCausalLM]


class WideNorm(LlamaRMSNorm):
    """RMSNorm by its formula in the type of its input, where transformers' own rounds fp64 to fp32."""

    def __init__(self, base: LlamaRMSNorm) -> None:
        nn.Module.__init__(self)
        self.weight, self.variance_epsilon = base.weight, base.variance_epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inverse = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden_states * inverse)


def with_wide_norms(model: LlamaForCausalLM) -> LlamaForCausalLM:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                setattr(module, name, WideNorm(child))
    return model


def plain_model(
    make: Make, version: str, *, sizes: dict[str, Any] | None = None, **adapter: Any
) -> LlamaForCausalLM:
    """Return an adapted fp64 model that plain autograd differentiates: its own nodes stand back where the
    base's weights have gradients too."""
    model = with_wide_norms(adapt(make(**(sizes or {})), version, **adapter).double())
    trained = {name for name, _ in trainable_parameters(model)}
    model.requires_grad_(True)
    vars(model)["trained_names"] = trained
    return model.train()


def grouped_model(
    make: Make,
    version: str,
    groups: int,
    *,
    tile: int | None = 4,
    sizes: dict[str, Any] | None = None,
    **adapter: Any,
) -> LlamaForCausalLM:
    """Return the same model in head groups."""
    model = with_wide_norms(adapt(make(**(sizes or {})), version, **adapter).double())
    group_heads(model, MemorySettings(head_groups=groups, mlp_tile=tile))
    return model.train()


def gradients(
    model: LlamaForCausalLM, ids: torch.Tensor, position_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a loss of ``model`` that looks at every token, and the gradient of every adapter's tensor."""
    model.zero_grad()
    log_probability = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits.log_softmax(-1)
    weight = torch.linspace(0.5, 1.5, ids.numel(), dtype=log_probability.dtype).view(*ids.shape, 1)
    loss = -(log_probability.gather(-1, ids[..., None]) * weight).sum()
    loss.backward()
    return loss.detach(), trained_gradients(model)


def trained_gradients(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    names = vars(model).get("trained_names") or {name for name, _ in trainable_parameters(model)}
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in names:
            assert parameter.grad is not None, name
            found[name] = parameter.grad.clone()
    return found


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the L2 error over the L2 norm of each tensor, of which none is zero throughout."""
    assert found.keys() == expected.keys()
    assert all(float(tensor.norm()) > 0 for tensor in expected.values())
    return {
        name: float((found[name].double() - tensor).norm() / tensor.norm())
        for name, tensor in expected.items()
    }


def assert_equal_gradients(
    found: tuple[torch.Tensor, dict[str, torch.Tensor]],
    expected: tuple[torch.Tensor, dict[str, torch.Tensor]],
    bound: float,
) -> None:
    assert abs(float(found[0] - expected[0])) <= bound * abs(float(expected[0]))
    errors = relative_errors(found[1], expected[1])
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= bound, (worst, errors[worst])
