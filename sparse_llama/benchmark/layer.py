"""One decoder layer with adapters beside the frozen layer that transformers has: time and memory.

The adapters are away from their start, so that nothing is saved on a gate of 0 or a scale of 1. Plain
transformers takes a second turn under another name: what its ratio is off 1 is what the machine is off.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaForCausalLM

from sparse_llama.adapters.attach import trainable_parameters
from sparse_llama.benchmark.efficiency import Pass
from sparse_llama.benchmark.llamas import PLAIN, Llamas, adapt, copy_over, random_llama
from sparse_llama.benchmark.peak import extra_bytes
from sparse_llama.benchmark.shapes import Shape
from sparse_llama.benchmark.timing import Contender, Times, time_in_turns
from sparse_llama.config.settings import AdapterSettings

AGAIN = f"{PLAIN}, again"
_NOISE = 0.02
_PROBED_TOKENS = 256
_SHORT_TOKENS = 4096


@dataclass(frozen=True)
class LayerSizes:
    """What is measured: rows of (1, T, C) hidden states."""

    shape: Shape
    lengths: tuple[int, ...]
    """Of inference."""
    training_lengths: tuple[int, ...]
    dtype: torch.dtype
    repeats: int
    """Rounds of up to 4,096 tokens."""
    long_repeats: int
    """Rounds of more."""
    warm_up_s: float = 1.0

    def rounds(self, num_tokens: int) -> int:
        """Return how often each contender is timed at a length."""
        return self.repeats if num_tokens <= _SHORT_TOKENS else self.long_repeats

    @property
    def cases(self) -> list[tuple[int, bool]]:
        """Each length, and whether it is trained."""
        both = [
            *((length, False) for length in self.lengths),
            *((one, True) for one in self.training_lengths),
        ]
        return sorted(both)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class LayerCost:
    """One contender."""

    name: str
    times: Times
    ratio: dict[Pass, float]
    """Median times over those of the layer of plain transformers."""
    kept_bytes_per_token: float | None
    """Of tensors that wait for the backward pass, without parameters; None in inference."""
    extra_bytes: int | None
    """Peak beyond the layer and its input."""


@dataclass(frozen=True)
class LayerGroup:
    """All contenders at one length; ``forward`` alone in inference."""

    num_tokens: int
    is_training: bool
    rounds: int
    costs: tuple[LayerCost, ...]


def prepare_layers(sizes: LayerSizes, device: torch.device) -> Llamas:
    """Return the contenders, each a LLaMA of one layer."""
    longest = max(length for length, _ in sizes.cases)
    base = random_llama(sizes.shape, num_tokens=longest, dtype=sizes.dtype, device=device)
    llamas = {name: copy_over(base) for name in (PLAIN, "v1", "v2", AGAIN)}
    generator = torch.Generator().manual_seed(1)
    for version in ("v1", "v2"):
        adapt(llamas[version], AdapterSettings(version=version, start_layer=0))
        for _, parameter in trainable_parameters(llamas[version]):
            parameter.data += _NOISE * torch.randn(parameter.shape, generator=generator).to(parameter)
    return llamas


def estimate_s(layers: Llamas, sizes: LayerSizes, device: torch.device) -> float:
    """Return about how many seconds all measurements take, from a short forward pass of the plain layer."""
    num_tokens = min(_PROBED_TOKENS, *(length for length, _ in sizes.cases))
    probe = [_contender("probe", layers[PLAIN], num_tokens, device, is_training=False)]
    forward_ms = time_in_turns(probe, device, repeats=3, warm_up_s=0.0)["probe"]["forward"].median_ms
    flops_per_s = sizes.shape.layer_flops(num_tokens, is_training=False) / forward_ms * 1e3
    flops = sum(
        (sizes.rounds(length) + 2) * sizes.shape.layer_flops(length, is_training=trains)  # warm-up, and peak
        for length, trains in sizes.cases
    )
    return len(layers) * flops / flops_per_s


def measure_layers(
    layers: Llamas, sizes: LayerSizes, *, num_tokens: int, is_training: bool, device: torch.device
) -> LayerGroup:
    """Return what each contender's layer costs at one length, all of them in turns."""
    in_turns = [
        _contender(name, llama, num_tokens, device, is_training=is_training) for name, llama in layers.items()
    ]
    rounds = sizes.rounds(num_tokens)
    times = time_in_turns(in_turns, device, repeats=rounds, warm_up_s=sizes.warm_up_s)
    costs: list[LayerCost] = []
    for one in in_turns:
        plain, own = times[PLAIN], times[one.name]
        ratio: dict[Pass, float] = {which: own[which].median_ms / plain[which].median_ms for which in own}
        kept = kept_bytes(one.forward, layers[one.name]) / num_tokens if is_training else None
        costs.append(LayerCost(one.name, own, ratio, kept, extra_bytes(_whole(one), device)))
    return LayerGroup(num_tokens, is_training, rounds, tuple(costs))


def kept_bytes(forward: Callable[[], torch.Tensor], module: nn.Module) -> int:
    """Return the bytes of all tensors that ``forward`` saves for its backward pass, each storage once.

    Parameters are there anyhow and do not count. What a recomputation saves in the backward pass is not seen.
    """
    parameters = {one.untyped_storage().data_ptr() for one in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad  # and so holds what was saved until here: no address was used twice
    return sum(kept.values())


def _contender(
    name: str, llama: LlamaForCausalLM, num_tokens: int, device: torch.device, *, is_training: bool
) -> Contender:
    """Return the layer on normal random hidden states; the backward pass is of those and of what trains."""
    generator = torch.Generator().manual_seed(2)
    shape = (1, num_tokens, llama.config.hidden_size)
    hidden, grad = (
        torch.randn(shape, generator=generator).to(device=device, dtype=llama.dtype) for _ in range(2)
    )
    positions = torch.arange(num_tokens, device=device)[None]
    (layer,) = llama.model.layers
    rotation = llama.model.rotary_emb(hidden, positions)
    hidden.requires_grad_(is_training)
    leaves = [hidden, *(one for _, one in trainable_parameters(layer))]

    def forward() -> torch.Tensor:
        layer.train(is_training)
        with torch.set_grad_enabled(is_training):
            return layer(hidden, position_embeddings=rotation, position_ids=positions)

    def backward(output: torch.Tensor) -> object:
        return torch.autograd.grad(output, leaves, grad)

    return Contender(name, forward, backward if is_training else None)


def _whole(one: Contender) -> Callable[[], object]:
    """Return the pass that is timed, as one call."""
    backward = one.backward
    return one.forward if backward is None else lambda: backward(one.forward())
