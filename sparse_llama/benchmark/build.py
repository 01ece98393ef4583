"""What building a layout costs: time, and the bytes that it keeps."""

import time
from dataclasses import dataclass

import torch

from sparse_llama.benchmark.layouts import Options, layout_options
from sparse_llama.benchmark.timing import Timing, summarise
from sparse_llama.layouts import Layout, build_layout


@dataclass(frozen=True)
class Built:
    """The cost of one layout."""

    layout: str
    options: Options
    """The ``sparse_attention`` block."""
    num_tokens: int
    density: float
    time: Timing
    num_bytes: int
    num_bytes_dense: int
    """Of DeepSpeed's (H, N, N) int64 tensor."""


def measure_build(name: str, *, num_tokens: int, block: int, num_heads: int, repeats: int) -> Built:
    """Return the cost of the layout called ``name``.

    Raises:
        ConfigError: there are too few blocks.
    """
    options = layout_options(name, block=block, num_tokens=num_tokens)
    num_blocks = -(-num_tokens // block)
    samples: list[float] = []
    layout: Layout | None = None
    for _ in range(repeats + 1):
        layout = None  # two at a time would be twice the memory
        started = time.perf_counter()
        layout = build_layout(options, num_heads, num_blocks)
        samples.append((time.perf_counter() - started) * 1e3)
    assert layout is not None
    return Built(
        name,
        options,
        num_tokens,
        layout.density_at(num_tokens),
        summarise(samples[1:]),  # the first one loads code
        tensor_bytes(layout),
        num_heads * num_blocks**2 * 8,
    )


def tensor_bytes(holder: object) -> int:
    """Return the bytes of all tensors that an object and its parts hold, each storage once.

    What is in dictionaries, such as what kernels derive from a layout, does not count.
    """
    storages: dict[int, int] = {}

    def visit(item: object) -> None:
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, tuple | list):
            for one in item:
                visit(one)
        elif hasattr(item, "__dict__"):
            for one in vars(item).values():
                visit(one)

    visit(holder)
    return sum(storages.values())
