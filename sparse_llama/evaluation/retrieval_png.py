"""What a model finds in long texts, as a picture."""

from pathlib import Path

from sparse_llama.evaluation.retrieval import Retrieval
from sparse_llama.reporting.heat_map_png import HeatMap, save_heat_maps


def draw_retrieval(result: Retrieval, file: Path, highest_loss: float | None = None) -> None:
    """Draw right answers and losses as heat maps, by depth and length.

    Args:
        highest_loss: the end of the losses' scale, the same for pictures that are to be compared; None is the
            highest of ``result``.

    Raises:
        ConfigError: the file cannot be written.
    """
    rows = [f"{depth:.0%}" for depth in result.depths]
    columns = [f"{length:,}" for length in result.lengths]
    exact = [[cell.exact for cell in cells] for cells in result.by_depth()]
    losses = [[cell.loss for cell in cells] for cells in result.by_depth()]
    highest = max(max(row) for row in losses) if highest_loss is None else highest_loss
    maps = [
        HeatMap(f"share of {result.trials} answers that are right", rows, columns, exact, highest=1.0),
        HeatMap(
            "loss of the right answer, nats per token",
            rows,
            columns,
            losses,
            highest=highest,
            is_low_dark=True,
        ),
    ]
    title = f"{result.model}, {result.attention}: {result.kind} in {result.haystack}"
    save_heat_maps(maps, title, file, row_label="depth", column_label="tokens")
