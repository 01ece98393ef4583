"""The ladder of memory levers as a picture: a bar for each, as long as the longest row that fits."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from sparse_llama.errors import ConfigError

_WIDTH_INCHES, _BAR_INCHES = 8.0, 0.34


def save_ladder(bars: Sequence[tuple[str, int]], title: str, file: Path) -> None:
    """Draw ``bars`` of name and tokens, the first on top, on a logarithmic scale; where nothing fits there is
    a name without a bar.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, which only a PNG needs
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    height = _BAR_INCHES * len(bars) + 1.4
    figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(bars))
    most = max((tokens for _, tokens in bars), default=1) or 1
    shortest = min((tokens for _, tokens in bars if tokens), default=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(shortest / 4, most * 4)  # room for the first bar, and for the numbers after the last
    axes.barh(places, [tokens or shortest / 4 for _, tokens in bars], color="#1f77b4", height=0.7)
    for place, (_, tokens) in zip(places, bars, strict=True):
        text = f" {tokens:,}" if tokens else " does not fit"
        axes.text(tokens or shortest / 4, place, text, va="center", fontsize=8)
    axes.set_yticks(places, [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _tokens(tokens)))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("longest row, tokens", fontsize=9)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title(textwrap.fill(title, 90), fontsize=9)
    try:
        figure.savefig(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror})") from error


def _tokens(count: float) -> str:
    return f"{count / 1024:g}K" if count >= 1024 else f"{count:g}"
