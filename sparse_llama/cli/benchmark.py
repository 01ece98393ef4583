"""``launch/benchmark.py``."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_llama.benchmark.layouts import LAYOUT_NAMES, layout_options
from sparse_llama.cli.adapter_cost import (
    LAYER_FLAGS,
    STEP_FLAGS,
    add_adapter_cost_flags,
    layer_cost,
    step_cost,
)
from sparse_llama.cli.entry import is_main
from sparse_llama.cli.flags import Parser, parser
from sparse_llama.cli.memory_cost import MEMORY_FLAGS, add_memory_flags, memory_cost
from sparse_llama.cli.results import (
    device_slug,
    make_folder,
    numbers,
    results_console,
    split,
    tell_files,
)
from sparse_llama.config.section import suggest
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from sparse_llama.benchmark.attention import Sizes
    from sparse_llama.benchmark.contenders import Backend

_SCRIPT = "launch/benchmark.py"
_ONLY_ATTENTION = ("kv_heads", "head_dim", "dtype", "backends")
_ATTENTION_FLAGS = ("modes", "lengths", "blocks", "heads", *_ONLY_ATTENTION)
_TRAINING = {"layer": layer_cost, "step": step_cost, "memory": memory_cost}
_DEFAULT_REPEATS = 20
_BACKENDS: dict[str, tuple["Backend", ...]] = {"cpu": ("blockwise", "flex"), "cuda": ("triton", "flex")}
_LENGTHS = {"cpu": (4096, 8192, 16384), "cuda": (4096, 8192, 16384, 32768, 65536)}
_BLOCKS = {"cpu": (16, 64), "cuda": (16, 64, 128)}
_HEADS = {"cpu": 8, "cuda": 32}
_HEAD_DIM = {"cpu": 64, "cuda": 128}
_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def benchmark_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/benchmark.py``: what is measured, and at which sizes."""
    flags = parser(doc)
    add = flags.add_argument
    add(
        "what",
        choices=("attention", "layouts", "kernels", *_TRAINING),
        help="attention: time and memory against dense flash attention; layouts: time to build, and bytes; "
        "kernels: registers and utilisation of the Triton kernels, without a GPU; layer: a decoder layer "
        "with adapters; step: a training step beside plain transformers and PEFT; memory: its peak, lever by "
        "lever",
    )
    add("--modes", metavar="A,B", help=f"layouts, of {', '.join(LAYOUT_NAMES)} (default: all)")
    add(
        "--lengths",
        metavar="N,N",
        help="tokens (default: 4096,8192,16384; on CUDA to 65536; layouts: 524288; layer: 2048,16384; "
        "memory: 4096,16384,131072)",
    )
    add("--blocks", metavar="N,N", help="tokens of a block (default: 16,64; on CUDA 128 too; layouts: 16)")
    add("--heads", type=int, metavar="N", help="query heads (default: 8; on CUDA, layouts, layer: 32)")
    add(
        "--repeats",
        type=int,
        metavar="N",
        help=f"rounds (default: {_DEFAULT_REPEATS}; layer and step: 5, 3 of more than 4096 tokens on a CPU)",
    )
    add(
        "--output_dir",
        type=Path,
        default=Path("docs/results"),
        metavar="DIR",
        help="where results go (default: docs/results), in place of earlier ones of the same device",
    )
    add = flags.add_argument_group("attention; layer and step take some").add_argument
    add("--kv_heads", type=int, metavar="N", help="key and value heads (default: as many as query heads)")
    add("--head_dim", type=int, metavar="N", help="width of a head (default: 64; on CUDA, layer: 128)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32; on CUDA bfloat16")
    add(
        "--backends",
        metavar="A,B",
        help="blockwise, triton, flex, or auto (default): what runs on the device",
    )
    add_adapter_cost_flags(flags)
    add_memory_flags(flags)
    return flags


def benchmark(arguments: argparse.Namespace) -> None:
    """Measure, print and save; mistakes are told before torch is imported."""
    if not is_main():
        return  # two at a time would measure each other
    if arguments.repeats is not None and arguments.repeats < 1:
        raise ConfigError(f"--repeats: must be 1 or more, got {arguments.repeats}")
    if arguments.heads is not None and arguments.heads < 1:
        raise ConfigError(f"--heads: must be 1 or more, got {arguments.heads}")
    _refuse_others(arguments)
    if arguments.what in _TRAINING:
        _TRAINING[arguments.what](arguments)
        return
    arguments.repeats = arguments.repeats or _DEFAULT_REPEATS
    modes = _modes(arguments.modes)
    lengths, blocks = numbers("lengths", arguments.lengths), numbers("blocks", arguments.blocks)
    if arguments.what == "layouts":
        _layouts(arguments, modes, lengths or (524288,), blocks or (16,))
    elif arguments.what == "kernels":
        _kernels(arguments, modes, lengths or (16384,), blocks or (16, 64, 128))
    else:
        _attention(arguments, modes, lengths, blocks)


def _layouts(
    arguments: argparse.Namespace, modes: tuple[str, ...], lengths: tuple[int, ...], blocks: tuple[int, ...]
) -> None:
    for name in _ONLY_ATTENTION:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name}: belongs to attention; layouts have no tensors")
    _check_sizes(modes, lengths, blocks)
    make_folder(arguments.output_dir)
    from sparse_llama.benchmark.build import measure_build
    from sparse_llama.benchmark.provenance import provenance
    from sparse_llama.benchmark.report import BUILD_HEADER, build_row, save_builds
    from sparse_llama.reporting.tables import show_columns

    origin = provenance(_SCRIPT, sys.argv[1:])
    built = [
        measure_build(
            mode, num_tokens=length, block=block, num_heads=arguments.heads or 32, repeats=arguments.repeats
        )
        for length in lengths
        for block in blocks
        for mode in modes
    ]
    show_columns("layouts", BUILD_HEADER, map(build_row, built), results_console())
    tell_files(save_builds(arguments.output_dir, "layouts", built, origin))


def _kernels(
    arguments: argparse.Namespace, modes: tuple[str, ...], lengths: tuple[int, ...], blocks: tuple[int, ...]
) -> None:
    for name in (*_ONLY_ATTENTION, "heads"):
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name}: no choice of kernels; widths of 64 to 256 in bf16 are compiled")
    if len(lengths) != 1:
        raise ConfigError("--lengths: kernels are counted at one; leave it out for 16384")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigError("TRITON_INTERPRET: 1 leaves nothing to compile; unset it")
    _check_sizes(modes, lengths, blocks)
    make_folder(arguments.output_dir)
    from sparse_llama.attention.triton_compile import compile_report
    from sparse_llama.benchmark.kernels import (
        COMPILED_HEADER,
        USE_HEADER,
        compiled_row,
        count_use,
        save_kernels,
        use_row,
    )
    from sparse_llama.benchmark.provenance import provenance
    from sparse_llama.reporting.tables import show_columns

    origin = provenance(_SCRIPT, sys.argv[1:])
    print("compiling for sm_80 and sm_90 ...", flush=True)
    compiled = list(compile_report(blocks=blocks))
    show_columns("compiled", COMPILED_HEADER, map(compiled_row, compiled), results_console())
    used = list(count_use(modes, num_tokens=lengths[0], blocks=blocks))
    show_columns(f"utilisation, {lengths[0]:,} tokens", USE_HEADER, map(use_row, used), results_console())
    tell_files(save_kernels(arguments.output_dir, compiled, used, origin))


def _attention(
    arguments: argparse.Namespace,
    modes: tuple[str, ...],
    lengths: tuple[int, ...] | None,
    blocks: tuple[int, ...] | None,
) -> None:
    _check_heads(arguments)
    if lengths is not None and blocks is not None:
        _check_sizes(modes, lengths, blocks)
    from sparse_llama.distributed.ranks import device

    place = device()
    lengths, blocks = lengths or _LENGTHS[place.type], blocks or _BLOCKS[place.type]
    _check_sizes(modes, lengths, blocks)
    backends, skipped = _backends(arguments.backends, place)
    sizes = _sizes(arguments, modes, lengths, blocks, backends, place)
    make_folder(arguments.output_dir)

    from sparse_llama.benchmark.attention import measure_group
    from sparse_llama.benchmark.provenance import clock_mhz, provenance
    from sparse_llama.benchmark.report import PASS_HEADER, group_title, pass_rows, save_attention, subject
    from sparse_llama.reporting.tables import show_columns, show_table

    origin = provenance(_SCRIPT, sys.argv[1:])
    console = results_console()
    show_table("benchmark", [("measured", subject(sizes)), ("hardware", origin.hardware)], console)
    for backend, reason in skipped.items():
        print(f"not measured: {backend}; {reason}")
    clocks = [clock_mhz()]
    groups = []
    for length in lengths:
        for block in blocks:
            print(f"measuring {length:,} tokens, block {block} ...", flush=True)
            groups.append(measure_group(sizes, num_tokens=length, block=block, device=place))
            show_columns(group_title(groups[-1]), PASS_HEADER, pass_rows(groups[-1]), console)
    clocks.append(clock_mhz())
    name = f"attention_{device_slug(origin.hardware, place)}"
    tell_files(save_attention(arguments.output_dir, name, groups, sizes, skipped, clocks, origin))


def _sizes(
    arguments: argparse.Namespace,
    modes: tuple[str, ...],
    lengths: tuple[int, ...],
    blocks: tuple[int, ...],
    backends: tuple["Backend", ...],
    place: "torch.device",
) -> "Sizes":
    import torch

    from sparse_llama.benchmark.attention import Sizes

    num_heads = arguments.heads or _HEADS[place.type]
    num_kv_heads = arguments.kv_heads or num_heads
    if num_heads % num_kv_heads != 0:
        raise ConfigError(f"--kv_heads: must divide the {num_heads} query heads, got {num_kv_heads}")
    return Sizes(
        layouts=modes,
        lengths=lengths,
        blocks=blocks,
        backends=backends,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=arguments.head_dim or _HEAD_DIM[place.type],
        dtype=getattr(torch, arguments.dtype or _DTYPE[place.type]),
        repeats=arguments.repeats,
    )


def _backends(text: str | None, place: "torch.device") -> tuple[tuple["Backend", ...], dict[str, str]]:
    """Return what is measured, and what is not, with the reason; a backend that was named has to run."""
    from sparse_llama.benchmark.contenders import why_not

    if text is None or text == "auto":
        wanted = _BACKENDS[place.type]
        reasons = {backend: why_not(backend, place) for backend in wanted}
        skipped = {backend: reason for backend, reason in reasons.items() if reason is not None}
        return tuple(backend for backend in wanted if backend not in skipped), skipped
    known: dict[str, Backend] = {"blockwise": "blockwise", "triton": "triton", "flex": "flex"}
    named: list[Backend] = []
    for name in split(text):
        if name not in known:
            raise ConfigError(f"--backends: none is called {name!a}{suggest(name, [*known, 'auto'])}")
        reason = why_not(known[name], place)
        if reason is not None:
            raise ConfigError(f"--backends: {name} does not run on this {place.type} device; {reason}")
        named.append(known[name])
    return tuple(named), {}


def _modes(text: str | None) -> tuple[str, ...]:
    names = LAYOUT_NAMES if text is None else split(text)
    for name in names:
        if name not in LAYOUT_NAMES:
            raise ConfigError(f"--modes: none is called {name!a}{suggest(name, LAYOUT_NAMES)}")
    return tuple(names)


def _refuse_others(arguments: argparse.Namespace) -> None:
    """Refuse flags of another measurement; attention, layouts and kernels tell theirs apart themselves."""
    owners = {
        "attention": _ATTENTION_FLAGS,
        "layer": LAYER_FLAGS,
        "step": STEP_FLAGS,
        "memory": MEMORY_FLAGS,
    }
    taken = owners.get(arguments.what, _ATTENTION_FLAGS)
    for name in dict.fromkeys(flag for flags in owners.values() for flag in flags):
        if name not in taken and getattr(arguments, name) is not None:
            *others, last = (owner for owner, flags in owners.items() if name in flags)
            named = f"{', '.join(others)} and {last}" if others else last
            raise ConfigError(f"--{name}: belongs to {named}; {arguments.what} does not take it, see --help")


def _check_heads(arguments: argparse.Namespace) -> None:
    for name in ("kv_heads", "head_dim"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise ConfigError(f"--{name}: must be 1 or more, got {number}")


def _check_sizes(modes: tuple[str, ...], lengths: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    for length in lengths:
        for block in blocks:
            for mode in modes:
                layout_options(mode, block=block, num_tokens=length)
