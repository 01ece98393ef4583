"""Activation checkpointing of decoder layers: keep a layer's input, compute the rest again in the backward
pass.

Always torch's non-reentrant checkpoint. The reentrant one (DeepSpeed's ``deepspeed.checkpointing.checkpoint``
too) makes no graph for a layer whose input needs no gradient, and behind a frozen embedding silently trains 3
tensors of 73. For the same reason nothing here makes the embedding's output require a gradient, as
transformers' own ``gradient_checkpointing_enable`` does: v1 would run its backward pass through the layers
below the first adapter for nothing.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from sparse_llama.config.deepspeed import ActivationCheckpointing


def checkpoint_layers(
    model: LlamaForCausalLM,
    settings: ActivationCheckpointing | None,
    first_layer: int,
    *,
    nvme_path: str | None = None,
) -> None:
    """Checkpoint every decoder layer from ``first_layer`` on while the model trains; None switches
    checkpointing off.

    Args:
        settings: DeepSpeed's ``activation_checkpointing`` block. With ``cpu_checkpointing`` the kept inputs
            wait in host memory: 2 bytes x C per token and layer in bf16, 8 KiB at 7B.
        first_layer: the lowest layer that trains; those below run forward only and keep nothing anyway.
    """
    for index, layer in enumerate(model.model.layers):
        assert isinstance(layer, GradientCheckpointingLayer)
        is_checkpointed = settings is not None and index >= first_layer
        layer.gradient_checkpointing = is_checkpointed
        if is_checkpointed:
            offloads = settings is not None and settings.cpu_checkpointing
            # transformers' own name for it; nn.Module's types know tensors and modules only
            vars(layer)["_gradient_checkpointing_func"] = _recompute_from_cpu if offloads else _recompute


def _recompute(function: Any, *args: Any) -> Any:
    # A LLaMA layer draws no random numbers: saving the generator's state would cost a device synchronisation
    # per layer.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _recompute_from_cpu(function: Any, *args: Any) -> Any:
    # The checkpoint's own hooks catch whatever is saved inside it, parameters included; only its inputs reach
    # these.
    inputs: list[torch.Tensor] = [value for value in args if torch.is_tensor(value)]
    assert not any(isinstance(value, nn.Parameter) for value in inputs), (
        "a frozen weight would be copied on every step"
    )
    with save_on_cpu(pin_memory=any(value.is_cuda for value in inputs)):
        return _recompute(function, *args)
