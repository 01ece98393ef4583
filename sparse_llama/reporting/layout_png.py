"""A layout as a PNG: one panel for each distinct head pattern."""

from pathlib import Path

from sparse_llama.errors import ConfigError
from sparse_llama.reporting.layout_picture import Picture

MOST_PANELS = 12
PANEL_CELLS = 256  # of a side: finer than that, a single column is no longer seen
_PANEL_INCHES = 4.2


def save_layouts(pictures: list[Picture], file: Path) -> None:
    """Draw ``pictures`` side by side.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, which only a PNG needs
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    # Tokens never attended to stand out from those above the diagonal, which no causal model attends to.
    shades = LinearSegmentedColormap.from_list("density", ["#e8ecf2", "#9dbfdc", "#2a6fb0", "#08264f"])
    colors = shades.with_extremes(bad="#ffffff")
    # Square root: a global column is 1/32 of a far cell, and has to be seen.
    scale = PowerNorm(0.5, vmin=0, vmax=1)
    num_columns = min(len(pictures), 4)
    num_rows = -(-len(pictures) // num_columns)
    size = (_PANEL_INCHES * num_columns + 0.9, _PANEL_INCHES * num_rows + 0.6)
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    image = None
    for panel, picture in zip(panels, pictures, strict=False):
        rows, columns = picture.shares.shape
        extent = (0, columns * picture.column_tokens, rows * picture.row_tokens, 0)
        image = panel.imshow(picture.shares.numpy(), cmap=colors, norm=scale, extent=extent)
        panel.set_xlim(0, picture.num_tokens)
        panel.set_ylim(picture.num_tokens, 0)
        panel.set_title(picture.title, fontsize=9)
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        panel.tick_params(labelsize=7)
        panel.locator_params(nbins=5)
        panel.set_xlabel("key token", fontsize=8)
        panel.set_ylabel("query token", fontsize=8)
        panel.spines[:].set_visible(False)  # a line over the first column would hide it
        if picture.token is not None:
            panel.axhline(picture.token + 0.5, color="#d1495b", linewidth=0.8)
    for panel in panels[len(pictures) :]:
        panel.set_axis_off()
    assert image is not None
    bar = figure.colorbar(image, ax=panels, shrink=0.7, ticks=[0, 0.05, 0.25, 0.5, 1])
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of a cell's causal token pairs that attend", fontsize=8)
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise ConfigError(f"--png {file}: cannot be written ({error.strerror}); name a file") from error
