"""What can be known of the Triton kernels without a GPU: what they need, and what they compute in vain.

A kernel that keeps registers in memory ("spills") is slower; one that needs more shared memory than there is
does not start. Utilisation is counted from the tables: pairs of tokens that attend, of those multiplied.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sparse_llama.attention.tiles import TiledLayout, Utilisation, choose_tiles
from sparse_llama.attention.triton_compile import Compiled
from sparse_llama.benchmark.layouts import describe_layout, layout_options
from sparse_llama.benchmark.provenance import Provenance
from sparse_llama.benchmark.report import markdown_table, origin_lines
from sparse_llama.layouts import build_layout
from sparse_llama.training.metrics import write_json

COMPILED_HEADER = [
    "kernel",
    "GPU",
    "head width",
    "block",
    "tile",
    "warps",
    "stages",
    "registers",
    "spill",
    "shared",
]
USE_HEADER = ["layout", "block", "density", "forward", "dq", "dk, dv"]
_HEAD_DIM, _CAPABILITY = 128, (8, 0)


@dataclass(frozen=True)
class Use:
    """How much of what the kernels compute of a layout is of use."""

    layout: str
    num_tokens: int
    block: int
    density: float
    utilisation: Utilisation


def count_use(names: Iterable[str], *, num_tokens: int, blocks: Iterable[int]) -> Iterator[Use]:
    """Yield the utilisation of every layout with an A100's tiles for bf16 heads of 128."""
    for block in blocks:
        tiles = choose_tiles(block, _HEAD_DIM, torch.bfloat16, _CAPABILITY)
        for name in names:
            options = layout_options(name, block=block, num_tokens=num_tokens)
            layout = build_layout(options, num_heads=2, num_blocks=-(-num_tokens // block))
            use = TiledLayout(layout).utilisation(num_tokens, tiles)
            yield Use(name, num_tokens, block, layout.density_at(num_tokens), use)


def compiled_row(one: Compiled) -> list[str]:
    """Return a kernel's needs under ``COMPILED_HEADER``."""
    tile = one.tile
    return [
        one.kernel,
        f"sm_{one.capability}",
        str(one.width),
        str(one.block),
        f"{tile.queries} x {tile.keys}",
        str(tile.num_warps),
        str(tile.num_stages),
        str(one.registers),
        f"{one.spill_bytes} B",
        f"{one.shared_bytes / 1024:.0f} KiB",
    ]


def use_row(one: Use) -> list[str]:
    """Return a layout's utilisation under ``USE_HEADER``."""
    return [one.layout, str(one.block), f"{one.density:.3f}", *(f"{share:.2f}" for share in one.utilisation)]


def save_kernels(
    folder: Path, compiled: Sequence[Compiled], used: Sequence[Use], origin: Provenance
) -> list[Path]:
    """Write kernels.json and kernels.md to ``folder``; return their paths."""
    files = [folder / f"kernels.{kind}" for kind in ("json", "md")]
    write_json(
        files[0],
        {
            "provenance": asdict(origin),
            "compiled": [asdict(one) for one in compiled],
            "utilisation": [asdict(one) | {"utilisation": one.utilisation._asdict()} for one in used],
        },
    )
    length = used[0].num_tokens
    lines = [
        "# The Triton kernels, compiled and counted",
        "",
        "No GPU was used: these figures stand in for a run. bf16, with the tiles each GPU gets. Registers",
        "are those of a thread, at most 255; spill is what a thread keeps in memory for want of more.",
        "",
        markdown_table(COMPILED_HEADER, map(compiled_row, compiled)),
        f"## Pairs of tokens that attend, of those that are multiplied: {length:,} tokens, tiles of an A100",
        "",
        *(f"* `{name}`: {describe_layout(name)}." for name in dict.fromkeys(one.layout for one in used)),
        "",
        markdown_table(USE_HEADER, map(use_row, used)),
        *origin_lines(origin),
    ]
    files[1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files
