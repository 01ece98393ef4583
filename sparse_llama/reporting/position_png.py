"""Perplexity by the position in the window, as a PNG: a line of steps for each model."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_llama.errors import ConfigError

_INCHES = (7.2, 4.2)


@dataclass(frozen=True)
class PositionCurve:
    """One model's perplexity over ranges of positions."""

    label: str
    ranges: Sequence[tuple[int, int]]
    """First and last position of each range, both included."""
    perplexities: Sequence[float]


def save_by_position(curves: Sequence[PositionCurve], title: str, file: Path) -> None:
    """Draw ``curves`` over one another; a range is a level line as long as it is.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, which only a PNG needs
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=_INCHES, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for curve in curves:
        axes.plot(*_steps(curve), label=textwrap.fill(curve.label, 60))
    axes.set_xlabel("tokens before it in the window", fontsize=9)
    axes.set_ylabel("perplexity", fontsize=9)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_xlim(left=0)
    shown = [value for curve in curves for value in curve.perplexities if math.isfinite(value)]
    highest = max(shown, default=1.0)
    axes.set_ylim(1, 1 + 1.1 * max(highest - 1, 0.01))  # a model that is certain, and right, has 1
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(textwrap.fill(title, 90), fontsize=10)
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise ConfigError(f"--png {file}: cannot be written ({error.strerror}); name a file") from error


def _steps(curve: PositionCurve) -> tuple[list[float], list[float]]:
    """Return the points of the line, which is broken where no token stands between two ranges."""
    edges, values = list[float](), list[float]()
    for (first, last), value in zip(curve.ranges, curve.perplexities, strict=True):
        if edges and edges[-1] != first - 1:
            edges.append(math.nan)
            values.append(math.nan)
        edges += [first - 1, last]
        values += [value, value]
    return edges, values
