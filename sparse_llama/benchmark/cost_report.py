"""What adapters cost, as terminal tables, as JSON with every quartile, and as Markdown for readers."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparse_llama.benchmark.layer import AGAIN, LayerGroup, LayerSizes
from sparse_llama.benchmark.llamas import PLAIN
from sparse_llama.benchmark.provenance import Provenance
from sparse_llama.benchmark.report import markdown_table, origin_lines, show_memory, show_ms, show_time
from sparse_llama.benchmark.shapes import Shape
from sparse_llama.benchmark.step import StepGroup, StepSizes
from sparse_llama.benchmark.timing import Times
from sparse_llama.training.metrics import write_json

_TIMES = ["ms", "forward", "backward"]
LAYER_HEADER = ["layer", *_TIMES, "over plain", "kept a token", "memory"]
STEP_HEADER = ["model", "trains", *_TIMES, "over plain", "tokens/s", "memory"]
_NONE = "-"


def layer_title(group: LayerGroup) -> str:
    """Return what was measured together."""
    case = "training" if group.is_training else "inference"
    return f"{group.num_tokens:,} tokens, {case}, {group.rounds} round{'s' if group.rounds > 1 else ''}"


def layer_rows(group: LayerGroup) -> list[list[str]]:
    """Return a row a contender under ``LAYER_HEADER``; the ratio is of both passes, or of the only one."""
    last = "both" if group.is_training else "forward"
    return [
        [
            one.name,
            *_times(one.times),
            f"{one.ratio[last]:.3f}",
            _NONE if one.kept_bytes_per_token is None else f"{one.kept_bytes_per_token / 1024:.1f} KiB",
            show_memory(one.extra_bytes),
        ]
        for one in group.costs
    ]


def step_title(group: StepGroup) -> str:
    """Return what was measured together."""
    return "with checkpointing" if group.is_checkpointed else "without checkpointing"


def step_rows(group: StepGroup) -> list[list[str]]:
    """Return a row a contender under ``STEP_HEADER``."""
    return [
        [
            one.name,
            f"{one.trainable_parameters:,}",
            *_times(one.times),
            f"{one.ratio:.3f}",
            f"{one.tokens_per_s:,.0f}",
            show_memory(one.extra_bytes),
        ]
        for one in group.costs
    ]


def layer_subject(sizes: LayerSizes) -> str:
    """Return what is measured, in words."""
    return f"One decoder layer: {_words(sizes.shape)}, {sizes.dtype_name}"


def step_subject(sizes: StepSizes) -> str:
    """Return what is measured, in words."""
    shape = sizes.shape
    model = f"{shape.num_layers} layers, {_words(shape)}, vocabulary {shape.vocabulary:,}, {sizes.dtype_name}"
    rows = "1 row" if sizes.num_rows == 1 else f"{sizes.num_rows} rows"
    return f"A training step: {rows} of {sizes.num_tokens:,} tokens, {model}"


def save_layers(
    folder: Path, name: str, groups: Sequence[LayerGroup], sizes: LayerSizes, origin: Provenance
) -> list[Path]:
    """Write NAME.json and NAME.md to ``folder``; return their paths."""
    lines = [
        "Median milliseconds, quartiles in brackets. `over plain` is the median over that of the layer that",
        f"transformers has; of `{AGAIN}`, the same layer once more, it is what the machine is off. In",
        "training the base is frozen, and the gradients are those of the layer's input and of what the",
        "adapter trains. `kept a token` is what waits for the backward pass, without parameters; `memory`",
        "the peak beyond the layer and its input.",
    ]
    tables = [(layer_title(group), markdown_table(LAYER_HEADER, layer_rows(group))) for group in groups]
    protocol = (
        "normal random numbers, adapters away from their start, the adapted layers with this project's",
        f"  dense attention and `{PLAIN}` with PyTorch's, all contenders of a section in turns,",
        "  after a warm-up of at least one round.",
    )
    files = [folder / f"{name}.{kind}" for kind in ("json", "md")]
    write_json(files[0], _document(sizes, groups, origin))
    files[1].write_text(_markdown(layer_subject(sizes), lines, tables, origin, protocol), encoding="utf-8")
    return files


def save_steps(
    folder: Path,
    name: str,
    groups: Sequence[StepGroup],
    sizes: StepSizes,
    left_out: dict[str, str],
    origin: Provenance,
) -> list[Path]:
    """Write NAME.json and NAME.md to ``folder``; return their paths."""
    lines = [
        "Median milliseconds, quartiles in brackets. `backward` includes the optimizer, Adam over fp32",
        f"masters of what trains. `over plain` is the median step over that of `{PLAIN}`: the frozen base,",
        "which trains nothing and runs backward through every layer; an adapter's backward pass ends at the",
        "lowest layer that it trains. `memory` is the peak of a step beyond model and optimizer.",
    ]
    tables = [(step_title(group), markdown_table(STEP_HEADER, step_rows(group))) for group in groups]
    worst = max(one.error for group in groups for one in group.costs)
    protocol = (
        "random weights and tokens, every token predicted, one loss and one checkpointing for all,",
        f"  all contenders of a section in turns, {sizes.repeats} rounds after a warm-up of at least one.",
        f"  Before it, untrained logits equal the base's within {worst:.1e} of the largest, and gradients",
        "  reach what trains and nothing else.",
    )
    files = [folder / f"{name}.{kind}" for kind in ("json", "md")]
    write_json(files[0], _document(sizes, groups, origin) | {"left_out": left_out})
    text = _markdown(step_subject(sizes), lines, tables, origin, protocol)
    text += "".join(f"* Not measured: {one}; {reason}.\n" for one, reason in left_out.items())
    files[1].write_text(text, encoding="utf-8")
    return files


def _document(
    sizes: LayerSizes | StepSizes, groups: Sequence[LayerGroup | StepGroup], origin: Provenance
) -> dict[str, Any]:
    return {
        "provenance": asdict(origin),
        "sizes": asdict(sizes) | {"dtype": sizes.dtype_name},
        "groups": [asdict(group) for group in groups],
    }


def _markdown(
    subject: str,
    lines: list[str],
    tables: list[tuple[str, str]],
    origin: Provenance,
    protocol: tuple[str, ...],
) -> str:
    sections = [part for title, table in tables for part in (f"## {title[0].upper()}{title[1:]}", "", table)]
    first, *others = protocol
    parts = [
        f"# {subject}",
        "",
        *lines,
        "",
        *sections,
        *origin_lines(origin),
        f"* Protocol: {first}",
        *others,
    ]
    return "\n".join(parts) + "\n"


def _times(times: Times) -> list[str]:
    """Return the time of all that is timed, with its quartiles, and of each pass where there are two."""
    if "both" not in times:
        return [show_time(times["forward"]), _NONE, _NONE]
    return [show_time(times["both"]), *(show_ms(times[which].median_ms) for which in ("forward", "backward"))]


def _words(shape: Shape) -> str:
    heads = f"{shape.num_heads} heads"
    if shape.num_kv_heads != shape.num_heads:
        heads += f" ({shape.num_kv_heads} of keys and values)"
    return f"width {shape.width:,}, {heads} of {shape.head_dim}, MLP {shape.mlp_width:,}"
