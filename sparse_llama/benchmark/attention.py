"""Block-sparse attention against dense flash attention: time, efficiency and memory.

All layouts and backends of one length and block take turns with the dense kernels, on the same tensors.
"""

from dataclasses import dataclass, field, replace

import torch

from sparse_llama.benchmark.check import worst_error
from sparse_llama.benchmark.contenders import (
    Backend,
    Inputs,
    contender,
    dense_kernels,
    draw_inputs,
    prepare_backend,
)
from sparse_llama.benchmark.efficiency import Efficiency, Pass, split_efficiency
from sparse_llama.benchmark.layouts import Options, layout_options
from sparse_llama.benchmark.peak import extra_bytes
from sparse_llama.benchmark.timing import Contender, Times, time_in_turns
from sparse_llama.errors import ConfigError
from sparse_llama.layouts import Layout, build_layout

FULL = "full"
"""The full causal layout, which a backend runs to show what its own code costs."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; (1, H, T, D) queries and (1, K, T, D) keys and values."""

    layouts: tuple[str, ...]
    lengths: tuple[int, ...]
    blocks: tuple[int, ...]
    backends: tuple[Backend, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    repeats: int
    warm_up_s: float = 1.0

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Measured:
    """One backend on one layout."""

    layout: str
    options: Options
    """The ``sparse_attention`` block."""
    backend: Backend
    density: float
    times: Times
    utilisation: dict[Pass, float]
    extra_bytes: int | None
    """Peak of memory beyond the inputs; output and gradients are in it."""
    error: float
    """Largest relative error of rows that were computed again in fp64."""
    speedup: dict[Pass, float] = field(default_factory=dict)
    efficiency: dict[Pass, Efficiency] = field(default_factory=dict)


@dataclass(frozen=True)
class Dense:
    """One of PyTorch's causal kernels."""

    kernel: str
    times: Times
    extra_bytes: int | None


@dataclass(frozen=True)
class Group:
    """Everything measured at one length and block."""

    num_tokens: int
    block: int
    dense: tuple[Dense, ...]
    full: tuple[Measured, ...]
    """Each backend on the full causal layout."""
    sparse: tuple[Measured, ...]

    def best_dense(self, which: Pass) -> Dense:
        """Return the dense kernel that is fastest in a pass."""
        return min(self.dense, key=lambda dense: dense.times[which].median_ms)


@dataclass(frozen=True, eq=False)
class _Case:
    """A backend on a layout, before it is timed."""

    layout_name: str
    options: Options
    layout: Layout
    backend: Backend
    utilisation: dict[Pass, float]
    contender: Contender


def measure_group(sizes: Sizes, *, num_tokens: int, block: int, device: torch.device) -> Group:
    """Return the measurements of one length and block.

    Raises:
        ConfigError: a layout cannot be made, or no dense kernel takes these heads.
    """
    inputs = draw_inputs(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        num_tokens=num_tokens,
        head_dim=sizes.head_dim,
        dtype=sizes.dtype,
        device=device,
    )
    dense = [contender(name, one, inputs, has_backward=True) for name, one in dense_kernels(inputs).items()]
    if not dense:
        raise ConfigError(
            f"--head_dim {sizes.head_dim}, --dtype {sizes.dtype_name}: no fused kernel of PyTorch takes them "
            f"on {device.type}; use a multiple of 8 up to 256, and bfloat16"
        )
    cases = _cases(sizes, num_tokens, block, inputs)
    errors = [worst_error(case.contender, case.layout, inputs) for case in cases]
    in_turns = [*dense, *(case.contender for case in cases)]
    times = time_in_turns(in_turns, device, repeats=sizes.repeats, warm_up_s=sizes.warm_up_s)
    measured = [
        Measured(
            case.layout_name,
            case.options,
            case.backend,
            case.layout.density_at(num_tokens),
            times[case.contender.name],
            case.utilisation,
            _extra_bytes(case.contender, device),
            error,
        )
        for case, error in zip(cases, errors, strict=True)
    ]
    plain = tuple(Dense(one.name, times[one.name], _extra_bytes(one, device)) for one in dense)
    full = tuple(one for one in measured if one.layout == FULL)
    group = Group(num_tokens, block, plain, full, sparse=())
    return replace(group, sparse=tuple(compare(one, group) for one in measured if one.layout != FULL))


def _cases(sizes: Sizes, num_tokens: int, block: int, inputs: Inputs) -> list[_Case]:
    options = {name: layout_options(name, block=block, num_tokens=num_tokens) for name in sizes.layouts}
    options[FULL] = {"mode": "dense", "block": block}
    cases: list[_Case] = []
    for name, one in options.items():
        layout = build_layout(one, num_heads=sizes.num_heads, num_blocks=-(-num_tokens // block))
        for backend in sizes.backends:
            prepared = prepare_backend(backend, layout, inputs)
            timed = contender(
                f"{backend} on {name}", prepared.attend, inputs, has_backward=prepared.has_backward
            )
            cases.append(_Case(name, one, layout, backend, prepared.utilisation, timed))
    return cases


def _extra_bytes(one: Contender, device: torch.device) -> int | None:
    def run() -> object:
        output = one.forward()
        return (output, None if one.backward is None else one.backward(output))

    return extra_bytes(run, device)


def compare(measured: Measured, group: Group) -> Measured:
    """Return ``measured`` with its speed-up over the best dense kernel of each pass, and its efficiency."""
    (full,) = (one for one in group.full if one.backend == measured.backend)
    speedup: dict[Pass, float] = {}
    efficiency: dict[Pass, Efficiency] = {}
    for which, timing in measured.times.items():
        dense_ms = group.best_dense(which).times[which].median_ms
        speedup[which] = dense_ms / timing.median_ms
        efficiency[which] = split_efficiency(
            dense_ms=dense_ms,
            sparse_ms=timing.median_ms,
            causal_ms=full.times[which].median_ms,
            density=measured.density,
            utilisation=measured.utilisation[which],
        )
    return replace(measured, speedup=speedup, efficiency=efficiency)
