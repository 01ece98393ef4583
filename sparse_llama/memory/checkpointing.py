"""Activation checkpointing of decoder layers: keep a layer's input, compute the rest again in the backward
pass.

Always torch's non-reentrant checkpoint. The reentrant one (DeepSpeed's ``deepspeed.checkpointing.checkpoint``
too) makes no graph for a layer whose input needs no gradient, and behind a frozen embedding silently trains 3
tensors of 73. For the same reason nothing here makes the embedding's output require a gradient, as
transformers' own ``gradient_checkpointing_enable`` does: v1 would run its backward pass through the layers
below the first adapter for nothing.
"""

from functools import partial
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from sparse_llama.config.deepspeed import ActivationCheckpointing
from sparse_llama.distributed.dataless import holds_data
from sparse_llama.memory.nested import LayerInputs
from sparse_llama.memory.offload import HostOffload, OffloadEngine
from sparse_llama.memory.offload_drive import DriveOffload

_FUNCTION = "_gradient_checkpointing_func"
"""transformers' own name for it."""


def checkpoint_layers(
    model: LlamaForCausalLM,
    settings: ActivationCheckpointing | None,
    first_layer: int,
    *,
    nvme_path: str | None = None,
) -> tuple[str, ...]:
    """Checkpoint every decoder layer from ``first_layer`` on while the model trains; None switches
    checkpointing off. Return what the user has to be told.

    What waits for the backward pass is an input of (B, T, C) per layer, 2 bytes x C per token in bf16, 8 KiB
    at 7B; with ``number_checkpoints`` of every k-th layer (``inputs_every``), counted from ``first_layer``.
    The cosines and sines of the positions are not among it: all layers share one pair, which stays on the
    device.

    Args:
        settings: DeepSpeed's ``activation_checkpointing`` block. With ``cpu_checkpointing`` the kept inputs
            wait in host memory.
        first_layer: the lowest layer that trains; those below run forward only and keep nothing anyway.
        nvme_path: with ``cpu_checkpointing``, the inputs go on from host memory to files in this folder.

    Raises:
        OffloadError: no file can be made there.
    """
    layers = model.model.layers
    num_trained = len(layers) - first_layer
    inputs = None
    if settings is not None:
        every = inputs_every(num_trained, settings.number_checkpoints)
        inputs = LayerInputs(every, _make_engine(model, settings, nvme_path))
    for index, layer in enumerate(layers):
        assert isinstance(layer, GradientCheckpointingLayer)
        layer.gradient_checkpointing = inputs is not None and index >= first_layer
        vars(layer).pop(_FUNCTION, None)  # nn.Module's types know tensors and modules only
        if inputs is not None and index >= first_layer:
            vars(layer)[_FUNCTION] = partial(
                inputs.run, index - first_layer, is_own_checkpoint=getattr(layer, "keeps_only_input", False)
            )
    if settings is None or (settings.number_checkpoints or 0) <= num_trained:
        return ()
    return (
        f"activation_checkpointing.number_checkpoints: no effect of {settings.number_checkpoints}; "
        f"{num_trained} layers train, and each keeps its input",
    )


def inputs_every(num_layers: int, number_checkpoints: int | None) -> int:
    """Return k, the layers per kept input: ceil(num_layers / number_checkpoints), at least 1.

    DeepSpeed's rule, over the layers that train: those below keep nothing. ceil(num_layers / k) inputs are
    kept, which is at most the number asked for: of 30 layers and 20, every second one's, 15.
    """
    return 1 if number_checkpoints is None else max(1, -(-num_layers // number_checkpoints))


def offload_engine(model: LlamaForCausalLM) -> OffloadEngine | None:
    """Return the engine that keeps the inputs of ``model``'s layers elsewhere; None without one."""
    function: Any = vars(model.model.layers[-1]).get(_FUNCTION)
    inputs = getattr(getattr(function, "func", None), "__self__", None)
    return inputs.engine if isinstance(inputs, LayerInputs) else None


def _make_engine(
    model: LlamaForCausalLM, settings: ActivationCheckpointing, nvme_path: str | None
) -> OffloadEngine | None:
    if not settings.cpu_checkpointing:
        return None
    if nvme_path is None:
        return HostOffload()
    engine = DriveOffload(Path(nvme_path))
    if holds_data(model.model.embed_tokens.weight):
        engine.check()
    return engine
