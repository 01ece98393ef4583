"""The pictures of a study's report, drawn from what its runs have left."""

from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

from sparse_llama.reporting.heat_map_png import HeatMap, save_heat_maps
from sparse_llama.reporting.loss_png import LossCurve, LossPanel, save_losses
from sparse_llama.reporting.page import Picture
from sparse_llama.reporting.position_png import PositionCurve, save_by_position
from sparse_llama.study.results import Results
from sparse_llama.study.runs import BASE
from sparse_llama.study.settings import EQUAL_STEPS

Measured = dict[str, Any]


def loss_pictures(results: Results) -> list[Picture]:
    """Draw the loss over the steps, of the first seed's runs; none before a run is done."""
    study = results.study
    panels = []
    for seq_length in study.settings.lengths:
        firsts = [results.of(variant, seq_length, EQUAL_STEPS)[0] for variant in study.settings.variants]
        curves = [
            LossCurve(one.run.variant, one.train_curve(), one.validation_curve())
            for one in firsts
            if one.summary is not None
        ]
        if curves:
            panels.append(LossPanel(f"{seq_length:,} tokens", curves))
    if not panels:
        return []
    file = study.output_dir / "losses.png"
    save_losses(panels, f"{study.name}: loss", file)
    words = "Loss over the steps of training, and of validation, of the first seed; on a logarithmic scale."
    return [Picture(file, words)]


def position_pictures(results: Results, seq_length: int) -> list[Picture]:
    """Draw the perplexity by position of the held-out responses and of every text, of base and variants; the
    mean of all seeds."""
    settings = results.study.settings
    texts = settings.evaluation.texts
    pictures = []
    if settings.evaluation.records:
        curves = _position_curves(results, seq_length, lambda measured: measured["records"])
        words = "Perplexity of the responses to held-out records, by position in the record."
        pictures += _draw_positions(results, curves, f"positions_{seq_length}_records.png", words)
    for number, text in enumerate(texts):
        curves = _position_curves(results, seq_length, lambda measured, text=text: measured["texts"][text])
        words = f"Perplexity by position in the window, {text}."
        pictures += _draw_positions(results, curves, f"positions_{seq_length}_{number}.png", words)
    return pictures


def _draw_positions(
    results: Results, curves: list[PositionCurve], name: str, words: str
) -> Iterator[Picture]:
    others = [value for curve in curves if curve.label != BASE for value in curve.perplexities]
    base = [value for curve in curves if curve.label == BASE for value in curve.perplexities]
    if base and others and min(base) > max(others):  # nothing else could be told apart beside it
        curves = [curve for curve in curves if curve.label != BASE]
        words += f" The base's is {min(base):,.1f} to {max(base):,.1f}, and not drawn."
    if curves:
        file = results.study.output_dir / name
        save_by_position(curves, words.partition(".")[0], file)
        yield Picture(file, words)


def _position_curves(
    results: Results, seq_length: int, part_of: Callable[[Measured], Measured]
) -> list[PositionCurve]:
    curves = []
    for name, found in _by_model(results, seq_length):
        ranges = [part["by_position"] for one in found if "error" not in (part := part_of(one))]
        if ranges:
            places = [(part["first"], part["last"]) for part in ranges[0]]
            values = [mean(part["perplexity"] for part in parts) for parts in zip(*ranges, strict=True)]
            curves.append(PositionCurve(name, places, values))
    return curves


def retrieval_pictures(results: Results, seq_length: int) -> list[Picture]:
    """Draw what base and variants find in long texts, by length and depth; the mean of all seeds."""
    asked = results.study.settings.evaluation.retrieval
    if asked is None:
        return []
    found = [
        (name, runs)
        for name, measured in _by_model(results, seq_length)
        if (runs := [one["retrieval"]["cells"] for one in measured if "error" not in one["retrieval"]])
    ]
    if not found:
        return []
    highest = max(cell["loss"] for _, runs in found for cells in runs for cell in cells)
    pictures = []
    for key, words, limit in (
        ("exact", f"Share of {asked.trials} answers that are right", 1.0),
        ("loss", "Loss of the right answer, nats per token", highest),
    ):
        maps = [_heat_map(name, runs, key, limit) for name, runs in found]
        file = results.study.output_dir / f"retrieval_{key}_{seq_length}.png"
        title = f"{asked.kind}, runs of {seq_length:,} tokens: {words.lower()}"
        save_heat_maps(maps, title, file, row_label="depth", column_label="tokens")
        pictures.append(Picture(file, f"{words}, by the length of the text and the fact's depth in it."))
    return pictures


def retrieval_errors(results: Results, seq_length: int) -> list[str]:
    """Return why nothing was looked for in long texts, each reason once."""
    found = [one.get("retrieval") or {} for _, measured in _by_model(results, seq_length) for one in measured]
    return list(dict.fromkeys(one["error"] for one in found if "error" in one))


def _heat_map(name: str, runs: Sequence[Sequence[dict[str, Any]]], key: str, highest: float) -> HeatMap:
    lengths = list(dict.fromkeys(cell["length"] for cell in runs[0]))
    depths = list(dict.fromkeys(cell["depth"] for cell in runs[0]))
    values = {
        (cells[0]["depth"], cells[0]["length"]): mean(cell[key] for cell in cells)
        for cells in zip(*runs, strict=True)
    }
    return HeatMap(
        name,
        [f"{depth:.0%}" for depth in depths],
        [f"{length:,}" for length in lengths],
        [[values[depth, length] for length in lengths] for depth in depths],
        highest=highest,
        is_low_dark=key == "loss",
    )


def _by_model(results: Results, seq_length: int) -> Iterator[tuple[str, list[Measured]]]:
    """Return what the base and the runs of each variant were measured at, where they were."""
    if seq_length in results.bases:
        yield BASE, [results.bases[seq_length]]
    for variant in results.study.settings.variants:
        runs = results.of(variant, seq_length, EQUAL_STEPS)
        found = [one.measured for one in runs if one.measured is not None]
        if found:
            yield variant, found
