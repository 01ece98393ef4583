"""Which module a tensor was made in, and when the forward and the backward pass of a layer begin."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparse_llama.model.objective import TokenLoss
from sparse_llama.planning.tracker import BACKWARD, MemoryTracker


@contextmanager
def label_modules(objective: TokenLoss, tracker: MemoryTracker) -> Iterator[None]:
    """Label what is made inside by module or, in the backward pass, by the node of the graph, and begin the
    journal's phases.

    A layer's backward phase begins where the gradient of its output arrives, so a recomputation is in it.
    """
    labels = _Labels(tracker)
    handles: list[Any] = []
    names = {module: _short_name(name) for name, module in objective.named_modules()}
    layers = {layer: index for index, layer in enumerate(objective.llama.model.layers)}
    for module, name in names.items():
        if module is objective or module in layers:
            continue
        enter, leave = labels.around(name)
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    for layer, index in layers.items():
        handles.append(layer.register_forward_pre_hook(labels.begin_layer(index)))
        handles.append(layer.register_forward_hook(labels.end_layer(index, is_last=index == len(layers) - 1)))
        norm = layer.input_layernorm
        handles.append(norm.register_forward_pre_hook(labels.take_input, prepend=True))  # type: ignore[operator]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        tracker.component, tracker.name = "other", ""


class _Labels:
    def __init__(self, tracker: MemoryTracker) -> None:
        self._tracker = tracker
        self._stack: list[tuple[str, str]] = [("activations", "")]
        self._is_forward = True

    def around(self, name: str) -> tuple[Any, Any]:
        """Return the hooks of a module's forward pass."""
        component = _component_of(name)

        def enter(*_: Any) -> None:
            self._stack.append((component or self._stack[-1][0], name))
            self._apply()

        def leave(*_: Any) -> None:
            if len(self._stack) > 1:
                self._stack.pop()
            self._apply()

        return enter, leave

    def begin_layer(self, index: int) -> Any:
        def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._tracker.relabel(args[0], "layer inputs", "layers")
            if self._is_forward and torch.is_grad_enabled():
                self._tracker.journal.begin("forward", index)
                self._stack = [("activations", "layers")]
                self._apply()

        return begin

    def end_layer(self, index: int, *, is_last: bool) -> Any:
        def end(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            if not self._is_forward or not torch.is_grad_enabled():
                return
            if output.grad_fn is not None:
                output.grad_fn.register_prehook(self._begin_backward(index))
            if is_last:
                self._tracker.journal.begin("loss")
                self._stack = [("logits and loss", "")]
                self._apply()

        return end

    def take_input(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._tracker.relabel(args[0], "layer inputs", "layers")

    def _begin_backward(self, index: int) -> Any:
        def begin(_: Any) -> None:
            self._is_forward = False
            self._tracker.journal.begin("backward", index)
            self._stack = [("activations", BACKWARD)]
            self._apply()

        return begin

    def _apply(self) -> None:
        self._tracker.component, self._tracker.name = self._stack[-1]


def _short_name(name: str) -> str:
    """Return a module's path from the model's parts on, without layer numbers."""
    return ".".join(part for part in name.split(".") if not part.isdigit() and part not in ("llama", "model"))


def _component_of(name: str) -> str | None:
    """Return the component of what a module makes; None is that of the module around it."""
    if "rotary_emb" in name:
        return "rope"
    if name.startswith(("lm_head", "head_loss", "norm")):
        return "logits and loss"
    return "activations" if name.startswith(("layers", "embed_tokens")) else None
