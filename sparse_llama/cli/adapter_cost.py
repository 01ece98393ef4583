"""``launch/benchmark.py layer`` and ``step``: what adapters cost."""

import argparse
import sys
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sparse_llama.benchmark.shapes import SHAPES, Shape
from sparse_llama.cli.results import device_slug, make_folder, numbers, results_console, tell_files
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from sparse_llama.benchmark.provenance import Provenance

LAYER_FLAGS = (
    "lengths",
    "training_lengths",
    "width",
    "mlp_width",
    "heads",
    "kv_heads",
    "head_dim",
    "dtype",
)
STEP_FLAGS = ("shape", "seq_length", "batch", "top_layers", "checkpointing", "dtype")
_7B = SHAPES["7b"]
_LENGTHS = (2048, 16384)
_TRAINING_LENGTHS = {"cpu": (2048,), "cuda": _LENGTHS}
_LAYER_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
_REPEATS = 5
_LONG_REPEATS = {"cpu": 3, "cuda": _REPEATS}  # 16,384 tokens take two CPU cores a minute
_TABLE_WIDTH = 128
_SHAPE = {"cpu": "mid", "cuda": "7b"}
_STEP_DTYPE = {"small": "float32", "narrow": "float32", "mid": "float32", "7b": "bfloat16"}
_STEP_TOKENS = {"small": 256, "narrow": 512, "mid": 512, "7b": 2048}
_CHECKPOINTING = {"on": (True,), "off": (False,), "both": (False, True)}


def add_adapter_cost_flags(flags: argparse.ArgumentParser) -> None:
    """Add what only ``layer`` and ``step`` take."""
    add = flags.add_argument_group(
        "layer, with --lengths, --heads, --kv_heads, --head_dim, --dtype"
    ).add_argument
    add("--training_lengths", metavar="N,N", help="tokens to train on (default: 2048; on CUDA 16384 too)")
    add("--width", type=int, metavar="N", help=f"width of the model (default: {_7B.width})")
    add("--mlp_width", type=int, metavar="N", help=f"width of the MLP (default: {_7B.mlp_width})")
    add = flags.add_argument_group("step, with --dtype").add_argument
    add("--shape", choices=tuple(SHAPES), help="of the model (default: mid; memory: narrow; on CUDA 7b)")
    add("--seq_length", type=int, metavar="N", help="tokens of a row (default: 256 to 2048, by shape)")
    add("--batch", type=int, metavar="N", help="rows of a step (default: 1)")
    add(
        "--top_layers", type=int, metavar="N", help="of the v2 adapter on the top layers (default: a quarter)"
    )
    add("--checkpointing", choices=tuple(_CHECKPOINTING), help="of the layers' activations (default: both)")


def layer_cost(arguments: argparse.Namespace) -> None:
    """Measure a layer, print and save."""
    shape = _layer_shape(arguments)
    lengths = numbers("lengths", arguments.lengths) or _LENGTHS
    training_lengths = numbers("training_lengths", arguments.training_lengths)
    make_folder(arguments.output_dir)
    import torch

    from sparse_llama.benchmark.cost_report import (
        LAYER_HEADER,
        layer_rows,
        layer_subject,
        layer_title,
        save_layers,
    )
    from sparse_llama.benchmark.layer import LayerSizes, estimate_s, measure_layers, prepare_layers
    from sparse_llama.distributed.ranks import device
    from sparse_llama.reporting.tables import format_seconds, show_columns, show_table

    place = device()
    sizes = LayerSizes(
        shape,
        lengths,
        training_lengths or _TRAINING_LENGTHS[place.type],
        getattr(torch, arguments.dtype or _LAYER_DTYPE[place.type]),
        repeats=arguments.repeats or _REPEATS,
        long_repeats=arguments.repeats or _LONG_REPEATS[place.type],
    )
    origin = origin_with_peft()
    console = results_console(_TABLE_WIDTH)
    show_table("benchmark", [("measured", layer_subject(sizes)), ("hardware", origin.hardware)], console)
    layers = prepare_layers(sizes, place)
    print(f"this takes about {format_seconds(estimate_s(layers, sizes, place))}", flush=True)
    groups = []
    for length, is_training in sizes.cases:
        print(f"measuring {length:,} tokens, {'training' if is_training else 'inference'} ...", flush=True)
        groups.append(measure_layers(layers, sizes, num_tokens=length, is_training=is_training, device=place))
        show_columns(layer_title(groups[-1]), LAYER_HEADER, layer_rows(groups[-1]), console)
    name = f"layer_{device_slug(origin.hardware, place)}"
    tell_files(save_layers(arguments.output_dir, name, groups, sizes, origin))


def step_cost(arguments: argparse.Namespace) -> None:
    """Measure training steps, print and save."""
    for name in ("seq_length", "batch", "top_layers"):
        _positive(name, getattr(arguments, name))
    if arguments.seq_length == 1:
        raise ConfigError("--seq_length: 1 token predicts none; use 2 or more")
    if arguments.dtype == "float16":
        raise ConfigError(
            "--dtype: float16 trains with loss scaling only, which is not measured; use bfloat16"
        )
    make_folder(arguments.output_dir)
    from sparse_llama.distributed.ranks import device

    place = device()
    name = arguments.shape or _SHAPE[place.type]
    shape = SHAPES[name]
    top_layers = arguments.top_layers or shape.num_layers // 4
    if top_layers >= shape.num_layers:
        raise ConfigError(
            f"--top_layers: {top_layers} leaves none of the {shape.num_layers} layers of --shape {name} out; "
            f"use at most {shape.num_layers - 1}"
        )
    import torch

    from sparse_llama.benchmark.cost_report import (
        STEP_HEADER,
        save_steps,
        step_rows,
        step_subject,
        step_title,
    )
    from sparse_llama.benchmark.step import StepSizes, estimate_s, measure_steps, prepare_steps
    from sparse_llama.reporting.tables import format_seconds, show_columns, show_table

    sizes = StepSizes(
        shape,
        num_tokens=arguments.seq_length or _STEP_TOKENS[name],
        num_rows=arguments.batch or 1,
        top_layers=top_layers,
        checkpointing=_CHECKPOINTING[arguments.checkpointing or "both"],
        dtype=getattr(torch, arguments.dtype or _STEP_DTYPE[name]),
        repeats=arguments.repeats or _REPEATS,
    )
    origin = origin_with_peft()
    console = results_console(_TABLE_WIDTH)
    show_table("benchmark", [("measured", step_subject(sizes)), ("hardware", origin.hardware)], console)
    steps, left_out = prepare_steps(sizes, place)
    for one, reason in left_out.items():
        print(f"not measured: {one}; {reason}")
    print(f"this takes about {format_seconds(estimate_s(steps, sizes, place))}", flush=True)
    groups = []
    for is_checkpointed in sizes.checkpointing:
        print(f"measuring {'with' if is_checkpointed else 'without'} checkpointing ...", flush=True)
        groups.append(measure_steps(steps, sizes, is_checkpointed=is_checkpointed, device=place))
        show_columns(step_title(groups[-1]), STEP_HEADER, step_rows(groups[-1]), console)
    file = f"step_{device_slug(origin.hardware, place)}"
    tell_files(save_steps(arguments.output_dir, file, groups, sizes, left_out, origin))


def _layer_shape(arguments: argparse.Namespace) -> Shape:
    for name in ("width", "mlp_width", "heads", "kv_heads", "head_dim"):
        _positive(name, getattr(arguments, name))
    width, num_heads = arguments.width or _7B.width, arguments.heads or _7B.num_heads
    num_kv_heads = arguments.kv_heads or num_heads
    if num_heads % num_kv_heads != 0:
        raise ConfigError(f"--kv_heads: must divide the {num_heads} query heads, got {num_kv_heads}")
    if arguments.head_dim is None and width % num_heads != 0:
        raise ConfigError(
            f"--width: {width} is no multiple of {num_heads} heads; change one or give --head_dim"
        )
    head_dim = arguments.head_dim or width // num_heads
    if head_dim % 2 != 0:
        raise ConfigError(f"--head_dim: must be even, positions rotate pairs, got {head_dim}")
    mlp_width = arguments.mlp_width or _7B.mlp_width
    return Shape(1, width, num_heads, num_kv_heads, head_dim, mlp_width, vocabulary=2)


def _positive(name: str, number: int | None) -> None:
    if number is not None and number < 1:
        raise ConfigError(f"--{name}: must be 1 or more, got {number}")


def origin_with_peft() -> "Provenance":
    """Return where numbers come from that PEFT has a part in."""
    from sparse_llama.benchmark.provenance import provenance

    origin = provenance("launch/benchmark.py", sys.argv[1:])
    if find_spec("peft") is None:
        return origin
    return replace(origin, versions=origin.versions | {"peft": version("peft")})
