"""Compile the Triton kernels for a GPU that is not there, and say what they take of it.

Triton brings its own assembler, so this needs no driver. It stands in for a run: a kernel that does not fit
its registers keeps some in memory and is slower, one that does not fit shared memory does not start.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import gcd
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sparse_llama.attention import triton_kernels as kernels
from sparse_llama.attention.tiles import Tile, choose_tiles

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_FP32 = {"lse", "delta", "partial_key", "partial_value"}
_INT32 = {"items", "item_starts", "sums", "sum_starts", "key_units", "head_patterns"}
_NUMBERS = {"num_tiles", "num_tokens", "num_slots", "group_size", "num_each"}
"""Not specialised: nothing is known of them."""


@dataclass(frozen=True)
class Compiled:
    """One kernel's needs on one GPU."""

    kernel: str
    capability: int
    width: int
    block: int
    dtype: str
    tile: Tile
    registers: int
    """Of a thread, at most 255."""
    spill_bytes: int
    """Of a thread, kept in memory for want of registers."""
    shared_bytes: int
    """Of a thread block."""


def compile_report(
    *,
    widths: Iterable[int] = (64, 96, 128, 256),
    capabilities: Iterable[int] = (80, 90),
    blocks: Iterable[int] = (16, 64, 128),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
) -> Iterator[Compiled]:
    """Yield the needs of every kernel with the tiles that ``choose_tiles`` gives it."""
    for capability, dtype, width, block in product(capabilities, dtypes, widths, blocks):
        tiles = choose_tiles(block, width, dtype, divmod(capability, 10))
        adding = tiles.grad_key._replace(num_warps=4, num_stages=3)  # Triton's defaults
        for kernel, tile in (
            (kernels.forward, tiles.forward),
            (kernels.grad_query, tiles.grad_query),
            (kernels.grad_key_value, tiles.grad_key),
            (kernels.add_partials, adding),
        ):
            yield compile_kernel(kernel, tile, capability=capability, width=width, block=block, dtype=dtype)


def compile_kernel(
    kernel: Any,
    tile: Tile,
    *,
    capability: int,
    width: int,
    block: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Compiled:
    """Return what ``kernel`` takes on a GPU of this compute capability."""
    assert isinstance(kernel, JITFunction), "interpreted: imported while TRITON_INTERPRET was 1"
    constants = _constants(tile, width, block)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _type(name, _TYPES[dtype]) for name in names}
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs=dict(_divisible_by_16(signature)),
    )
    compiled: Any = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True},
    )
    registers, spill_bytes = _resources(compiled.asm["cubin"])
    return Compiled(
        kernel.__name__,
        capability,
        width,
        block,
        _TYPES[dtype],
        tile,
        registers,
        spill_bytes,
        compiled.metadata.shared,
    )


def _constants(tile: Tile, width: int, block: int) -> dict[str, int]:
    return {
        "WIDTH": width,
        "PADDED": triton.next_power_of_2(width),
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "KEY_UNIT": gcd(block, tile.keys),
        "ROW_UNIT": gcd(block, tile.queries),
        "QUERY_UNIT": gcd(block, tile.queries),
        "ROWS": kernels.SLOT_ROWS,
    }


def _type(name: str, dtype: str) -> Any:
    if name == "full":
        return ("*i32", "*i32")
    if name == "masked":
        return ("*i32", "*i32", "*i32")
    if name.endswith("_strides"):
        return ("i32", "i32", "i32")
    if name in _NUMBERS:
        return "i32"
    if name == "scaling":
        return "fp32"
    return "*i32" if name in _INT32 else "*fp32" if name in _FP32 else f"*{dtype}"


def _divisible_by_16(signature: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], list[list[Any]]]]:
    """Yield what the launcher finds of real tensors: pointers and strides are multiples of 16."""
    for index, (name, kind) in enumerate(signature.items()):
        if name in _NUMBERS or kind in ("constexpr", "fp32"):
            continue
        places = [(index,)] if isinstance(kind, str) else [(index, inner) for inner in range(len(kind))]
        for place in places:
            yield place, [["tt.divisibility", 16]]


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack of a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2])
