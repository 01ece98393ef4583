"""Curves over the length of the sequence, as a PNG."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Color = tuple[float, float, float, float]
_PANEL_INCHES = (5.2, 3.4)
_REFERENCE = "#333333"
_CROSSES_APART = 1.12


@dataclass(frozen=True)
class Curve:
    """One line of a panel; curves of one label have one colour in all panels."""

    label: str
    lengths: Sequence[int]
    """Tokens."""
    values: Sequence[float]
    lower: Sequence[float] | None = None
    upper: Sequence[float] | None = None
    """Quartiles, shaded."""
    is_dashed: bool = False
    is_reference: bool = False
    """What the others are compared with: drawn in grey."""
    fails_at: Sequence[int] = ()
    """Lengths that have no value, as more than the panel's level would be needed: crosses above it, one above
    the other."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes; the lengths are on a logarithmic scale."""

    title: str
    unit: str
    """Of the values."""
    curves: Sequence[Curve]
    is_log: bool = False
    level: float | None = None
    """A value to compare with, drawn across."""


def save_curves(rows: Sequence[Sequence[Panel]], title: str, file: Path) -> None:
    """Draw ``rows`` of panels under ``title``; the legend, once, under all of them.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib import colormaps  # half a second, which only a PNG needs
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(rows[0]), height * len(rows) + 0.9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    curves = [curve for row in rows for panel in row for curve in panel.curves]
    names = dict.fromkeys(curve.label for curve in curves if not curve.is_reference)
    palette = [colormaps["tab10"](index) for index in range(10) if index != 7]  # 7 is grey, the reference's
    palette += [colormaps["tab20"](2 * index + 1) for index in range(10) if index != 7]  # lighter ones
    colors = dict(zip(names, cycle(palette), strict=False))
    shown: dict[str, Line2D] = {}
    for axes_row, row in zip(figure.subplots(len(rows), len(rows[0]), squeeze=False), rows, strict=True):
        for axes, panel in zip(axes_row, row, strict=True):
            _draw(axes, panel, colors, shown)
    figure.suptitle(textwrap.fill(title, 60 * len(rows[0])), fontsize=11)
    ncols = min(4, 2 * len(rows[0]))  # what has room
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=ncols, frameon=False, fontsize=9
    )
    try:
        figure.savefig(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror})") from error


def _draw(axes: "Axes", panel: Panel, colors: dict[str, Color], shown: "dict[str, Line2D]") -> None:
    """Draw a panel; ``shown`` collects a line for each entry of the legend."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    num_failing = 0
    for curve in panel.curves:
        color = _REFERENCE if curve.is_reference else colors[curve.label]
        style = "--" if curve.is_dashed else "-"
        (line,) = axes.plot(curve.lengths, curve.values, style, color=color, marker="o", markersize=3.5)
        if curve.lower is not None and curve.upper is not None:
            axes.fill_between(curve.lengths, curve.lower, curve.upper, color=color, alpha=0.15, linewidth=0)
        if curve.fails_at and panel.level is not None:
            num_failing += 1
            levels = [panel.level * _CROSSES_APART**num_failing] * len(curve.fails_at)
            axes.plot(curve.fails_at, levels, "x", color=color, markersize=6)
        if not curve.is_dashed or curve.label not in shown:
            shown[curve.label] = line
    if panel.level is not None:
        axes.axhline(panel.level, color=_REFERENCE, linewidth=0.8, linestyle=":")
    lengths = sorted({length for curve in panel.curves for length in (*curve.lengths, *curve.fails_at)})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_tokens(length) for length in lengths])
    if panel.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("tokens", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.grid(alpha=0.25)


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"
