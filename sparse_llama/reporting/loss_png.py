"""Loss over the steps of several runs, as a PNG: training thin, validation with marks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_llama.errors import ConfigError

_PANEL_INCHES = (6.4, 3.8)
_KEY_INCHES, _LETTER_INCHES, _LINE_INCHES = 0.55, 0.075, 0.25  # of an entry of the legend, 9 point
_KIND = "#333333"
_SMOOTHED = 0.1
"""The part of a run's steps that a point of its training curve is the mean of: a step's loss says more of its
batch than of the model."""


@dataclass(frozen=True)
class LossCurve:
    """One run's losses; steps and values."""

    label: str
    training: Sequence[tuple[int, float]]
    validation: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class LossPanel:
    """The curves of one pair of axes."""

    title: str
    curves: Sequence[LossCurve]


def save_losses(panels: Sequence[LossPanel], title: str, file: Path) -> None:
    """Draw ``panels`` side by side.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib import colormaps  # half a second, which only a PNG needs
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height + 0.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    palette = colormaps["tab10"]
    color_of = {label: palette(index % 10) for index, label in enumerate(labels)}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in panel.curves:
            color = color_of[curve.label]
            if curve.training:
                axes.plot(*zip(*smoothed(curve.training), strict=True), color=color, linewidth=1, alpha=0.55)
            if curve.validation:
                axes.plot(*zip(*curve.validation, strict=True), color=color, marker="o", markersize=3.5)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel("nats per labelled token", fontsize=9)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25, which="both")
    lines = [Line2D([], [], color=color_of[label], marker="o", markersize=3.5) for label in labels]
    kinds = [
        Line2D([], [], color=_KIND, linewidth=1, alpha=0.55),
        Line2D([], [], color=_KIND, marker="o"),
    ]
    figure.suptitle(title, fontsize=11)
    names = [*labels, "training, smoothed", "validation"]
    entry_inches = _KEY_INCHES + _LETTER_INCHES * max(map(len, names))
    columns = max(1, min(len(names), int(figure.get_figwidth() / entry_inches)))
    figure.set_figheight(height + 0.3 + _LINE_INCHES * -(-len(names) // columns))
    figure.legend(
        [*lines, *kinds], names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    try:
        figure.savefig(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror})") from error


def smoothed(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return every step with the mean of the last losses up to it, of a tenth of the curve."""
    width = max(1, round(_SMOOTHED * len(curve)))
    values = [value for _, value in curve]
    means = [
        sum(values[max(0, end - width) : end]) / len(values[max(0, end - width) : end])
        for end in range(1, len(values) + 1)
    ]
    return [(step, mean) for (step, _), mean in zip(curve, means, strict=True)]
