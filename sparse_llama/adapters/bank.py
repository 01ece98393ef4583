"""Several adapters on one base, by name: which of them computes, alone, mixed, or none.

A module of the model holds the parameters of what is active. Every adapter's own parameters wait here, so
that switching sets attributes and copies nothing, and an optimizer keeps the parameters it was given.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from sparse_llama.adapters.merge import head_gates
from sparse_llama.adapters.zero_init import GateActivation, ZeroInitAttention
from sparse_llama.attention.interface import AttentionPlan
from sparse_llama.config.settings import AdapterSettings, TemplateName
from sparse_llama.errors import ConfigError

DEFAULT = "default"
_ATTRIBUTE = "adapter_bank"


@dataclass(frozen=True, eq=False)
class NamedAdapter:
    """One adapter of a model."""

    settings: AdapterSettings
    parameters: dict[str, nn.Parameter]
    """By their names in the model."""
    plan: AttentionPlan
    """How the model attends with it: a sparse layout is part of what was trained."""
    seed: int
    template: TemplateName = "alpaca"
    """What stood around questions and answers in training."""


class AdapterBank:
    """The adapters of a model and what it was without them."""

    def __init__(self, model: LlamaForCausalLM, plan: AttentionPlan) -> None:
        self.adapters: dict[str, NamedAdapter] = {}
        self.active: dict[str, float] = {}
        """The weight of each adapter that computes."""
        self.base_plan = plan
        self._norms: dict[str, nn.Parameter] = {}
        vars(model)[_ATTRIBUTE] = self  # not setattr: it is no module, parameter or buffer

    def new_norm(self, path: str, module: nn.Module, dtype: torch.dtype) -> nn.Parameter:
        """Return a norm's weight for an adapter to train, keeping the base's own.

        A partitioned weight (ZeRO-3) is trained itself: a copy would need it whole, on every rank.
        """
        weight: Any = module.weight
        if hasattr(weight, "ds_id"):
            return weight.requires_grad_(True)
        own = self._norms.setdefault(path, weight)
        return nn.Parameter(own.detach().to(dtype, copy=True))

    def add(self, model: LlamaForCausalLM, name: str, adapter: NamedAdapter) -> None:
        """Take in an adapter, in place of one of the same name, and make it the only active one."""
        if name in self.adapters:
            self.remove(model, name)  # or what only the old one has would stay installed
        self.adapters[name] = adapter
        self.activate(model, {name: 1.0})

    def find(self, name: str, asked_by: str) -> NamedAdapter:
        """Return an adapter by its name, or raise ConfigError, which says who asked and what there is."""
        if name not in self.adapters:
            raise ConfigError(f"{asked_by}: no adapter is called {name!r}; there are {self.names}")
        return self.adapters[name]

    @property
    def names(self) -> str:
        """The adapters' names, for a message."""
        return ", ".join(map(repr, self.adapters))

    def remove(self, model: LlamaForCausalLM, name: str) -> None:
        """Forget an adapter; where it was active, none is."""
        if name in self.active:
            self.activate(model, {})
        del self.adapters[name]

    def activate(self, model: LlamaForCausalLM, weights: Mapping[str, float]) -> None:
        """Install the adapters in ``weights``: one as it is, several or a share of one as their mixture."""
        self.active = dict(weights)
        if set(weights.values()) == {1.0} and len(weights) == 1:
            (name,) = weights
            adapter = self.adapters[name]
            self._install(model, adapter.parameters, adapter.settings.gate_activation, {})
        else:
            parameters, segments = self._mix(model, weights)
            self._install(model, parameters, "none", segments)
        plan = self.adapters[next(iter(weights))].plan if weights else self.base_plan
        for layer in model.model.layers:
            attention: Any = layer.self_attn
            attention.attention_plan = plan

    def _install(
        self,
        model: LlamaForCausalLM,
        parameters: Mapping[str, nn.Parameter],
        gate_activation: GateActivation,
        segments: Mapping[str, tuple[int, ...]],
    ) -> None:
        paths = dict.fromkeys(path for adapter in self.adapters.values() for path in adapter.parameters)
        for path in paths:
            owner, _, kind = path.rpartition(".")
            module = model.get_submodule(owner)
            found = parameters.get(path, self._norms.get(path))
            if found is not None:
                found.data = found.data.to(_device(model, owner))  # no copy where it is there already
            setattr(module, kind, found)
            if isinstance(module, ZeroInitAttention):
                module.gate_activation, module.segments = gate_activation, segments.get(owner, ())

    def _mix(
        self, model: LlamaForCausalLM, weights: Mapping[str, float]
    ) -> tuple[dict[str, nn.Parameter], dict[str, tuple[int, ...]]]:
        """Return the parameters of a mixture, which do not train, and the prompts' lengths by module.

        Scales, biases and norms are moved from where they do nothing by the weighted sum of what each adapter
        moves them by. Prompts attend side by side, each by its own softmax, their gates times the weights.
        """
        mixed: dict[str, torch.Tensor] = {}
        prompts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, weight in weights.items():
            adapter = self.adapters[name]
            for path, parameter in adapter.parameters.items():
                owner, _, kind = path.rpartition(".")
                if kind == "prompt":
                    gate = adapter.parameters[f"{owner}.gate"].detach()
                    is_tanh = adapter.settings.gate_activation == "tanh"
                    gates = weight * head_gates(gate, model.config.num_attention_heads, is_tanh=is_tanh)
                    prompts.setdefault(owner, []).append((parameter.detach().float(), gates))
                elif kind != "gate":
                    start = self._start(path, parameter)
                    moved = weight * (parameter.detach().float() - start)
                    mixed[path] = mixed.get(path, start) + moved
        for owner, parts in prompts.items():
            mixed[f"{owner}.prompt"] = torch.cat([prompt for prompt, _ in parts])
            mixed[f"{owner}.gate"] = torch.stack([gates for _, gates in parts])
        segments = {owner: tuple(len(prompt) for prompt, _ in parts) for owner, parts in prompts.items()}
        return {path: nn.Parameter(tensor, requires_grad=False) for path, tensor in mixed.items()}, segments

    def _start(self, path: str, parameter: nn.Parameter) -> torch.Tensor:
        """Return where a parameter that is neither prompt nor gate does nothing, fp32."""
        if path in self._norms:
            return self._norms[path].detach().float()
        value = 1.0 if path.endswith("adapter_scale") else 0.0
        return torch.full_like(parameter, value, dtype=torch.float32, requires_grad=False)


def bank_of(model: nn.Module) -> AdapterBank | None:
    """Return the adapters of ``model``; None where it has none."""
    return vars(model).get(_ATTRIBUTE)


def set_adapter(model: LlamaForCausalLM, chosen: str | Mapping[str, float]) -> None:
    """Make one adapter active, or a mixture for inference: ``set_adapter(model, {"law": 0.7, "code": 0.3})``.

    A mixture of one adapter at weight 1 is that adapter, at weight 0 the base. It is made anew from the
    adapters' current values at each call, and does not train.

    Raises:
        ConfigError: there is no such adapter, or those to be mixed were trained with different layouts.
    """
    bank = require_bank(model)
    weights = {chosen: 1.0} if isinstance(chosen, str) else {name: float(w) for name, w in chosen.items()}
    layouts = {_layouts(bank.find(name, "set_adapter").plan) for name in weights}
    if not weights:
        raise ConfigError("set_adapter: no adapter is named; disable_adapters(model) leaves all out")
    if len(layouts) > 1:
        raise ConfigError(
            f"set_adapter: {', '.join(weights)} were trained with different attention layouts; mix adapters "
            "of one layout"
        )
    bank.activate(model, weights)


@contextmanager
def disable_adapters(model: LlamaForCausalLM) -> Iterator[None]:
    """Within the block ``model`` computes what the base computes, to the bit.

    Raises:
        ConfigError: the model has no adapter.
    """
    bank = require_bank(model)
    active = bank.active
    bank.activate(model, {})
    try:
        yield
    finally:
        bank.activate(model, active)


def delete_adapter(model: LlamaForCausalLM, name: str) -> None:
    """Forget an adapter; where it was active, none is.

    Raises:
        ConfigError: there is no such adapter.
    """
    bank = require_bank(model)
    bank.find(name, "delete_adapter")
    bank.remove(model, name)


def active_adapters(model: LlamaForCausalLM) -> dict[str, float]:
    """Return the names and weights of the adapters that compute."""
    return dict(require_bank(model).active)


def require_bank(model: LlamaForCausalLM) -> AdapterBank:
    """Return the adapters of ``model``, or raise ConfigError where it has none that can be switched."""
    bank = bank_of(model)
    if bank is None:
        raise ConfigError("the model has no adapter; attach_adapters or load_adapter adds one")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigError("adapters cannot be switched under ZeRO stage 3, which owns the parameters")
    return bank


def _layouts(plan: AttentionPlan) -> tuple[object, ...]:
    return tuple(None if one is None else (one.sparsity, one.num_tokens, one.seed) for one in plan.layers)


def _device(model: LlamaForCausalLM, owner: str) -> torch.device:
    """Return where the base's own weights beside a module are, which ``model.to`` has moved."""
    if not owner.startswith("model.layers."):
        return model.lm_head.weight.device
    layer = ".".join(owner.split(".")[:3])
    return model.get_submodule(layer).self_attn.q_proj.weight.device  # type: ignore[union-attr,return-value]
