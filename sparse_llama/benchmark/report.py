"""Results as a terminal table, as JSON with every quartile, as Markdown for readers, and as curves."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from sparse_llama.benchmark.attention import Group, Measured, Sizes
from sparse_llama.benchmark.build import Built
from sparse_llama.benchmark.efficiency import PASSES, Efficiency, Pass
from sparse_llama.benchmark.layouts import describe_layout
from sparse_llama.benchmark.provenance import Provenance
from sparse_llama.benchmark.timing import Times, Timing
from sparse_llama.reporting.curves import Curve, Panel, save_curves
from sparse_llama.reporting.tables import format_bytes
from sparse_llama.training.metrics import write_json

_NONE = "-"
TIME_HEADER = ["forward ms", "backward ms", "both ms"]
HEADER = [
    "layout",
    "density",
    "backend",
    *TIME_HEADER,
    "speed-up",
    "efficiency",
    "kernel x tile x schedule",
    "memory",
]

PASS_HEADER = ["layout, density", "pass", "ms", "speed-up", "efficiency", "kernel x tile x schedule"]
BUILD_HEADER = ["layout", "tokens", "block", "density", "build ms", "bytes", "dense bytes"]


def group_title(group: Group) -> str:
    """Return what was measured together."""
    return f"{group.num_tokens:,} tokens, block {group.block}"


def group_rows(group: Group) -> list[list[str]]:
    """Return the dense kernels, each backend on the full causal layout, and the layouts, under ``HEADER``.

    Speed-up and efficiency are forward / backward / both; the factors are those of both, or of what there is.
    """
    rows = [
        [
            f"dense, {one.kernel}",
            "1.000",
            "PyTorch",
            *_times(one.times),
            _NONE,
            _NONE,
            _NONE,
            show_memory(one.extra_bytes),
        ]
        for one in group.dense
    ]
    for one in (*group.full, *group.sparse):
        rows.append(
            [
                one.layout,
                f"{one.density:.3f}",
                one.backend,
                *_times(one.times),
                _join(f"{times:.2f}" for times in one.speedup.values()),
                _join(f"{efficiency.total:.2f}" for efficiency in one.efficiency.values()),
                _factors(list(one.efficiency.values())[-1]) if one.efficiency else _NONE,
                show_memory(one.extra_bytes),
            ]
        )
    return rows


def pass_rows(group: Group) -> list[list[str]]:
    """Return the same for a terminal, under ``PASS_HEADER``: a line a pass, and no long ones."""
    rows: list[list[str]] = []
    for dense in group.dense:
        labels = [f"dense, {dense.kernel}", f"  {show_memory(dense.extra_bytes)}", ""]
        rows += [
            [label, which, show_time(timing), _NONE, _NONE, _NONE]
            for label, (which, timing) in zip(labels, dense.times.items(), strict=False)
        ]
    for one in (*group.full, *group.sparse):
        # A backend without a backward pass has one line to say it all.
        labels = [one.layout, f"  {one.backend}, {one.density:.3f}", f"  {show_memory(one.extra_bytes)}"]
        for index, (which, timing) in enumerate(one.times.items()):
            compared = [_NONE, _NONE, _NONE]
            if which in one.efficiency:
                compared = [
                    f"{one.speedup[which]:.2f}",
                    f"{one.efficiency[which].total:.2f}",
                    _factors(one.efficiency[which]),
                ]
            label = labels[index] if len(one.times) > 1 else "\n".join(labels)
            rows.append([label, which, show_time(timing), *compared])
    return rows


def save_attention(
    folder: Path,
    name: str,
    groups: Sequence[Group],
    sizes: Sizes,
    skipped: dict[str, str],
    clocks: list[int | None],
    origin: Provenance,
) -> list[Path]:
    """Write NAME.json, NAME.md and NAME.png to ``folder``; return their paths.

    Args:
        skipped: backends that could not be measured, and why.
        clocks: of the GPU before and after, MHz.
    """
    files = [folder / f"{name}.{kind}" for kind in ("json", "md", "png")]
    write_json(
        files[0],
        {
            "provenance": asdict(origin),
            "sizes": asdict(sizes) | {"dtype": sizes.dtype_name},
            "skipped": skipped,
            "clocks_mhz": clocks,
            "groups": [asdict(group) for group in groups],
        },
    )
    files[1].write_text(_markdown(groups, sizes, skipped, origin), encoding="utf-8")
    save_curves(attention_panels(groups), f"{subject(sizes)}: {origin.hardware}", files[2])
    return files


def attention_panels(groups: Sequence[Group]) -> list[list[Panel]]:
    """Return forward time, forward and backward time, and efficiency over length, a column for each block.

    Without a backward pass there are no times of both, and efficiency is the forward pass'.
    """
    by_block = {
        block: sorted((group for group in groups if group.block == block), key=lambda group: group.num_tokens)
        for block in sorted({group.block for group in groups})
    }
    has_backward = any("both" in one.times for group in groups for one in group.sparse)
    timed: tuple[Pass, ...] = ("forward", "both") if has_backward else ("forward",)
    rows = [[_time_panel(own, block, which) for block, own in by_block.items()] for which in timed]
    return [*rows, [_efficiency_panel(own, block, timed[-1]) for block, own in by_block.items()]]


def build_row(built: Built) -> list[str]:
    """Return the cost of a layout under ``BUILD_HEADER``."""
    return [
        built.layout,
        f"{built.num_tokens:,}",
        str(built.options["block"]),
        f"{built.density:.4f}",
        show_time(built.time),
        format_bytes(built.num_bytes),
        format_bytes(built.num_bytes_dense),
    ]


def save_builds(folder: Path, name: str, built: Sequence[Built], origin: Provenance) -> list[Path]:
    """Write NAME.json and NAME.md to ``folder``; return their paths."""
    files = [folder / f"{name}.{kind}" for kind in ("json", "md")]
    write_json(files[0], {"provenance": asdict(origin), "layouts": [asdict(one) for one in built]})
    lines = [
        "# What building a layout costs",
        "",
        "Median time, with quartiles in brackets, and the bytes that the layout keeps; the last column is",
        "what DeepSpeed's (heads, blocks, blocks) int64 tensor would take.",
        "",
        *(f"* `{one}`: {describe_layout(one)}." for one in dict.fromkeys(one.layout for one in built)),
        "",
        markdown_table(BUILD_HEADER, map(build_row, built)),
        *origin_lines(origin),
    ]
    files[1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def markdown_table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def origin_lines(origin: Provenance) -> list[str]:
    """Return what a result has to say of where it comes from, as list items."""
    named = ", ".join(f"{name} {number}" for name, number in origin.versions.items())
    return [
        f"* Command: `{origin.command}`",
        f"* Hardware: {origin.hardware}.",
        f"* Versions: {named}; commit {origin.git_commit or 'unknown'}, {origin.date}.",
    ]


def subject(sizes: Sizes) -> str:
    """Return what is measured, in words."""
    heads = f"{sizes.num_heads} heads"
    if sizes.num_kv_heads != sizes.num_heads:
        heads += f" ({sizes.num_kv_heads} of keys and values)"
    return f"Block-sparse attention, {heads} of {sizes.head_dim}, {sizes.dtype_name}"


def show_time(timing: Timing) -> str:
    """Return a median with its quartiles in brackets."""
    median, lower, upper = (show_ms(ms) for ms in (timing.median_ms, timing.lower_ms, timing.upper_ms))
    return f"{median} ({lower} to {upper})"


def show_ms(ms: float) -> str:
    """Return three digits, and whole milliseconds from 100 on."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def show_memory(count: int | None) -> str:
    """Return bytes in words, and a dash where nothing measured them."""
    return _NONE if count is None else format_bytes(count)


def _markdown(groups: Sequence[Group], sizes: Sizes, skipped: dict[str, str], origin: Provenance) -> str:
    lines = [
        f"# {subject(sizes)}",
        "",
        "Medians, with quartiles in brackets. `speed-up` and `efficiency` are forward / backward / both;",
        "efficiency is speed-up over the best dense kernel times density, the share of the causal token",
        "pairs that attend. Its factors, of the last pass of a row: `kernel`, the dense kernel's time over",
        "the backend's on the full causal layout; `tile`, pairs that attend of those that are computed;",
        "`schedule`, the rest. `memory` is the peak beyond the inputs.",
        "",
        *(f"* `{name}`: {describe_layout(name)}." for name in sizes.layouts),
        "",
    ]
    for group in groups:
        table = markdown_table(HEADER, group_rows(group))
        lines += [f"## {group_title(group)[0].upper()}{group_title(group)[1:]}", "", table]
    lines += [
        *origin_lines(origin),
        "* Protocol: batch of 1, normal random numbers, all contenders of a section in turns,",
        f"  {sizes.repeats} rounds after a warm-up of {sizes.warm_up_s:g} s; a backward pass includes delta,",
        "  casts and all gradients, and no layout or table is built while the clock runs.",
    ]
    lines += [f"* Not measured: {backend}; {reason}." for backend, reason in skipped.items()]
    return "\n".join(lines) + "\n"


def _time_panel(groups: Sequence[Group], block: int, which: Pass) -> Panel:
    dense = [(group.num_tokens, group.best_dense(which).times[which]) for group in groups]
    curves = [_curve("dense", dense, is_reference=True)]
    for (layout, backend), found in _by_case(groups).items():
        points = [(length, one.times[which]) for length, one in found if which in one.times]
        if points:
            curves.append(_curve(layout, points, is_dashed=backend == "flex"))
    note = " (dashed: FlexAttention)" if any(curve.is_dashed for curve in curves) else ""
    return Panel(f"block {block}: {_pass_name(which)}{note}", "ms", curves, is_log=True)


def _efficiency_panel(groups: Sequence[Group], block: int, which: Pass) -> Panel:
    curves: list[Curve] = []
    for (layout, backend), found in _by_case(groups).items():
        points = [(length, one.efficiency[which].total) for length, one in found if which in one.efficiency]
        if points:
            lengths, values = zip(*points, strict=True)
            curves.append(Curve(layout, lengths, values, is_dashed=backend == "flex"))
    return Panel(f"block {block}: efficiency, {_pass_name(which)}", "speed-up x density", curves, level=1.0)


def _by_case(groups: Sequence[Group]) -> dict[tuple[str, str], list[tuple[int, Measured]]]:
    """Return the measurements of each layout and backend, with their lengths."""
    found: dict[tuple[str, str], list[tuple[int, Measured]]] = {}
    for group in groups:
        for one in group.sparse:
            found.setdefault((one.layout, one.backend), []).append((group.num_tokens, one))
    return found


def _curve(
    label: str, points: list[tuple[int, Timing]], *, is_dashed: bool = False, is_reference: bool = False
) -> Curve:
    return Curve(
        label,
        [length for length, _ in points],
        [timing.median_ms for _, timing in points],
        [timing.lower_ms for _, timing in points],
        [timing.upper_ms for _, timing in points],
        is_dashed=is_dashed,
        is_reference=is_reference,
    )


def _pass_name(which: Pass) -> str:
    return "forward + backward" if which == "both" else which


def _times(times: Times) -> list[str]:
    return [show_time(times[which]) if which in times else _NONE for which in PASSES]


def _factors(efficiency: Efficiency) -> str:
    return f"{efficiency.kernel:.2f} x {efficiency.tile:.2f} x {efficiency.schedule:.2f}"


def _join(numbers: Iterable[str]) -> str:
    return " / ".join(numbers) or _NONE
