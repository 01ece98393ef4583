"""Checkpoints of layers that keep the input of every k-th layer only.

The inputs between are computed again when the backward pass first needs one of them: forward passes without
gradients from the kept one, through the layers of its group. They are handed out as the backward pass walks
down the group, each of them freed by the layer that had it. So one layer's activations exist at a time, and
at most k - 1 inputs beside its own, where one checkpoint around k layers would hold the activations of all k
(16 tensors of token by width each).

A group costs the forward pass of its layers but the last once more: (k - 1) / k of a forward pass in all.
"""

import weakref
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sparse_llama.memory.offload import OffloadEngine, Stored

LayerCall = partial[torch.Tensor]
"""A decoder layer as a function of its input (B, T, C), as transformers gives it to a checkpoint:
``partial(forward, layer, **others)``."""


class LayerInputs:
    """The inputs that the checkpointed layers of a model keep.

    Args:
        every: k; 1 keeps every layer's.
        engine: where kept inputs wait; None leaves them where they are.
    """

    def __init__(self, every: int, engine: OffloadEngine | None) -> None:
        assert every >= 1
        self.every, self.engine = every, engine
        self._open: weakref.ref[_Group] | None = None
        """The group of the layers that run now; what autograd saved holds it, and nothing else."""

    def run(
        self, position: int, call: LayerCall, hidden: torch.Tensor, *, is_own_checkpoint: bool
    ) -> torch.Tensor:
        """Return the layer's output (B, T, C), with a graph that keeps no more of ``hidden`` than it should.

        Args:
            position: of the layer, counted from the lowest checkpointed one.
            is_own_checkpoint: the layer saves nothing but its input by itself; torch's checkpoint around it
                would run it once more.
        """
        if self.engine is None and self.every == 1:
            return _graph_of(call, hidden, is_own_checkpoint)  # and autograd sees a change in place
        assert not isinstance(hidden, nn.Parameter), "a frozen weight would be copied on every step"
        group = None if position % self.every == 0 or self._open is None else self._open()
        if group is None:
            group = _Group(self.engine)
            self._open = weakref.ref(group)
        kept = group.add(call, hidden)

        wanted = weakref.ref(hidden)  # autograd keeps the hooks as long as what they return

        def pack(tensor: torch.Tensor) -> "torch.Tensor | _Kept":
            return kept if tensor is wanted() else tensor

        with saved_tensors_hooks(pack, _unpack):
            return _graph_of(call, hidden, is_own_checkpoint)


def _graph_of(call: LayerCall, hidden: torch.Tensor, is_own_checkpoint: bool) -> torch.Tensor:
    if is_own_checkpoint:
        return call(hidden)
    # A LLaMA layer draws no random numbers: saving the generator's state would cost a device synchronisation
    # per layer. What is saved inside is caught by hooks of the checkpoint's own.
    output = checkpoint(call, hidden, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(output, torch.Tensor)
    return output


class _Kept(NamedTuple):
    """What stands for a layer's input in a graph."""

    group: "_Group"
    position: int


def _unpack(packed: "torch.Tensor | _Kept") -> torch.Tensor:
    return packed.group.take(packed.position) if isinstance(packed, _Kept) else packed


class _Group:
    """Layers from a kept input up to the next, in one forward pass."""

    def __init__(self, engine: OffloadEngine | None) -> None:
        self._engine = engine
        self._layers: list[LayerCall] = []
        self._first: torch.Tensor | Stored | None = None
        self._inputs: dict[int, torch.Tensor] = {}
        """At hand during the backward pass, by position."""

    def add(self, call: LayerCall, hidden: torch.Tensor) -> _Kept:
        """Take up the next layer; of the first one, the input too."""
        if not self._layers:
            self._first = hidden.detach() if self._engine is None else self._engine.store(hidden)
        self._layers.append(call)
        return _Kept(self, len(self._layers) - 1)

    def take(self, position: int) -> torch.Tensor:
        """Return a layer's input (B, T, C) and forget it: a second backward pass computes it again."""
        if position not in self._inputs:
            self._fill(position)
        return self._inputs.pop(position)

    def _fill(self, last: int) -> None:
        assert self._first is not None
        if isinstance(self._first, Stored):
            assert self._engine is not None
            hidden = self._engine.load(self._first)
        else:
            hidden = self._first
        self._inputs = {0: hidden}
        with torch.no_grad():
            for position, call in enumerate(self._layers[:last]):
                layer: nn.Module = call.args[0]
                # not call(hidden): hooks of the layer itself gather its weights under ZeRO-3
                hidden = layer(hidden, **call.keywords)
                self._inputs[position + 1] = hidden
