"""Tables of numbers as heat maps, side by side in one PNG."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_llama.errors import ConfigError

_CELL_INCHES, _MARGIN_INCHES = (0.75, 0.42), (2.0, 1.5)
_LEAST_INCHES = 3.6  # of a panel, for its title
_MOST_NUMBERS = 24  # columns; beyond that they run into one another
_DARK = 0.6  # share of the scale from which numbers are white


@dataclass(frozen=True)
class HeatMap:
    """One panel; ``values`` row by row."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    highest: float
    """The other end of the scale from 0, the same for maps that are to be compared."""
    number: str = "{:.2f}"
    is_low_dark: bool = False
    """Whether low values, not high ones, are the dark ones."""


def save_heat_maps(
    maps: Sequence[HeatMap], title: str, file: Path, *, row_label: str, column_label: str
) -> None:
    """Draw ``maps`` under ``title``.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, which only a PNG needs
    from matplotlib.figure import Figure

    widths = [max(_LEAST_INCHES, len(part.columns) * _CELL_INCHES[0] + _MARGIN_INCHES[0]) for part in maps]
    height = max(len(part.rows) for part in maps) * _CELL_INCHES[1] + _MARGIN_INCHES[1]
    figure = Figure(figsize=(sum(widths), height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(maps), squeeze=False, width_ratios=widths)[0]
    for axes, part in zip(panels, maps, strict=True):
        colors = "Blues_r" if part.is_low_dark else "Blues"
        image = axes.imshow(part.values, cmap=colors, vmin=0, vmax=part.highest, aspect="auto")
        axes.set_xticks(range(len(part.columns)), part.columns, fontsize=8)
        axes.set_yticks(range(len(part.rows)), part.rows, fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(part.title, fontsize=9)
        axes.set_xlabel(column_label, fontsize=8)
        axes.set_ylabel(row_label, fontsize=8)
        figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
        if len(part.columns) > _MOST_NUMBERS:
            continue
        for row, values in enumerate(part.values):
            for column, value in enumerate(values):
                share = value / part.highest if part.highest else 0.0
                is_dark = (1 - share if part.is_low_dark else share) > _DARK
                color = "white" if is_dark else "black"
                text = part.number.format(value)
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    figure.suptitle(textwrap.fill(title, round(13 * sum(widths))), fontsize=9)
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise ConfigError(f"--png {file}: cannot be written ({error.strerror}); name a file") from error
