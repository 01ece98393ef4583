"""The tables of a study's report: a row for each quantity, a column for each variant.

Over several seeds a cell is the median, with the least and the most in brackets.
"""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from sparse_llama.reporting.page import Cell, Grid
from sparse_llama.reporting.tables import format_bytes, format_seconds, format_share
from sparse_llama.study.results import Result, Results
from sparse_llama.study.runs import BASE
from sparse_llama.study.settings import EQUAL_STEPS, EQUAL_TIME

NONE = "-"
Read = Callable[[Result], float | None]
Show = Callable[[float], str]


def loss(value: float) -> str:
    """Return a loss as it is shown."""
    return f"{value:.4f}"


def of_summary(key: str) -> Read:
    """Return what reads a number of a run's summary."""
    return lambda result: None if result.summary is None else result.summary.get(key)


TRAINING: tuple[tuple[str, Read, Show], ...] = (
    ("parameters tuned", of_summary("trainable_parameters"), lambda value: f"{value:,.0f}"),
    ("density of attention", of_summary("density"), lambda value: f"{value:.2f}"),
    ("train loss (average)", of_summary("train_loss"), loss),
    ("validation loss, base", of_summary("validation_loss_before"), loss),
    ("validation loss, trained", of_summary("validation_loss"), loss),
    ("steps", of_summary("steps"), lambda value: f"{value:,.0f}"),
    ("training time", of_summary("elapsed_s"), format_seconds),
    ("tokens/s", of_summary("tokens_per_s"), lambda value: f"{value:,.0f}"),
    ("peak memory", lambda result: result.peak_bytes, lambda value: format_bytes(round(value))),
)
"""Of the 2023 report's Tables 2 and 3, and what belongs beside them."""


_COMPARED = tuple(row for row in TRAINING if row[0] not in ("validation loss, base", "steps"))


def training_table(results: Results, seq_length: int, compare: str = EQUAL_STEPS) -> Grid:
    """Return what training took and reached, by variant."""
    variants = list(results.study.settings.variants)
    rows: list[list[str | Cell]] = []
    for name, read, show in TRAINING:
        cells = [_cell(_runs(results, variant, seq_length, compare), read, show) for variant in variants]
        rows.append([name, *cells])
    return Grid(["", *variants], rows)


def shown(values: Sequence[float], show: Show) -> str:
    """Return values as one cell: the median, and how far they spread."""
    if not values:
        return NONE
    low, high = show(min(values)), show(max(values))
    return show(median(values)) if low == high else f"{show(median(values))} ({low} to {high})"


def perplexity_table(results: Results, seq_length: int) -> Grid | None:
    """Return the perplexity of each text, of base and variants; None where none was measured."""
    texts = results.study.settings.evaluation.texts
    if not texts:
        return None
    rows: list[list[str | Cell]] = []
    for text in texts:
        found = [_text_cell([_text_value(results.bases.get(seq_length), text)])]
        for variant in results.study.settings.variants:
            runs = results.of(variant, seq_length, EQUAL_STEPS)
            found.append(_text_cell([_text_value(one.measured, text) for one in runs]))
        rows.append([text, *found])
    return Grid(["text", BASE, *results.study.settings.variants], rows)


def category_table(results: Results, seq_length: int, key: str, compare: str = EQUAL_STEPS) -> Grid | None:
    """Return a score of the answers to held-out records by category, of base and variants; None where no
    record was answered.

    Args:
        key: ``exact_match`` or ``rouge_l``.
    """
    base = _by_category(results.bases.get(seq_length), key)
    columns = [[base] if base else []]
    for variant in results.study.settings.variants:
        runs = results.of(variant, seq_length, compare)
        columns.append([found for one in runs if (found := _by_category(one.measured, key))])
    categories = dict.fromkeys(name for column in columns for found in column for name in found)
    if not categories:
        return None
    show = format_share if key == "exact_match" else _three_digits
    rows = [[name, *(_category_cell(column, name, show) for column in columns)] for name in categories]
    return Grid(["category", BASE, *results.study.settings.variants], rows)


def answers_table(results: Results, seq_length: int) -> Grid | None:
    """Return what base and variants answer to each of the study's prompts; None where it has none."""
    prompts = results.study.settings.evaluation.prompts
    if not prompts:
        return None
    rows: list[list[str | Cell]] = []
    for prompt in prompts:
        rows.append([f"`{prompt}`", BASE, _answer(results.bases.get(seq_length), prompt)])
        for variant in results.study.settings.variants:
            first = next(iter(results.of(variant, seq_length, EQUAL_STEPS)), None)
            rows.append(["", variant, _answer(None if first is None else first.measured, prompt)])
    return Grid(["prompt", "", "answer"], rows, is_text=True)


def cost_table(results: Results, seq_length: int) -> Grid:
    """Return what each variant costs and gives beside its reference, at equal steps and at equal time."""
    settings = results.study.settings
    has_times = EQUAL_TIME in settings.compare
    rows: list[list[str | Cell]] = []
    for variant in settings.variants:
        named = settings.reference_of(variant)
        if named is None:
            continue
        reference = results.of(named, seq_length, EQUAL_STEPS)
        steps = results.of(variant, seq_length, EQUAL_STEPS)
        compared = [steps, results.of(variant, seq_length, EQUAL_TIME)] if has_times else [steps]
        rows.append(
            [
                Cell(variant, f"runs/{steps[0].run.name}/"),
                named,
                _cell(steps, of_summary("density"), lambda value: f"{value:.2f}"),
                _ratio(steps, reference, of_summary("tokens_per_s")),
                _ratio(steps, reference, lambda result: result.peak_bytes),
                *(_difference(runs, reference, of_summary("validation_loss")) for runs in compared),
                *(_difference(runs, reference, _exact_match, format_points) for runs in compared),
            ]
        )
    kinds = ["equal steps", "equal time"] if has_times else ["equal steps"]
    losses, matches = ([f"{what}, {kind}" for kind in kinds] for what in ("loss", "exact match"))
    return Grid(["", "beside", "density", "speed", "memory", *losses, *matches], rows)


def format_points(value: float) -> str:
    """Return a difference of two shares in percentage points."""
    return f"{100 * value:+.0f}"


def baseline_table(results: Results, baseline: Results) -> Grid | None:
    """Return what runs of the same name have in this study and in another; None where there are none."""
    others = {one.run.name: one for one in baseline.runs if one.summary is not None}
    rows: list[list[str | Cell]] = []
    for one in results.runs:
        other = others.get(one.run.name)
        if one.summary is None or other is None:
            continue
        cells = [_before_and_now(read(other), read(one), show) for _, read, show in _COMPARED]
        rows.append([Cell(one.run.name, f"runs/{one.run.name}/"), *cells])
    return Grid(["run", *(name for name, _, _ in _COMPARED)], rows) if rows else None


def _before_and_now(before: float | None, now: float | None, show: Show) -> str:
    if before is None or now is None:
        return NONE
    change = f" ({100 * (now / before - 1):+.1f}%)" if before else ""
    return f"{show(before)} -> {show(now)}{change}"


def status_table(results: Results) -> Grid:
    """Return every run with its folder and the command that repeats it."""
    rows: list[list[str | Cell]] = []
    for one in results.runs:
        status = "not run yet" if one.outcome is None else one.outcome.status
        reason = "" if one.outcome is None else one.outcome.reason
        command = "" if one.outcome is None else f"`{one.outcome.command}`"
        if one.measured is None and one.measuring is not None and not reason:
            reason = f"not measured, {one.measuring.status}: {one.measuring.reason}"
        rows.append([Cell(one.run.name, f"runs/{one.run.name}/"), status, reason or command])
    return Grid(["run", "", "repeated by, or why not"], rows, is_text=True)


def _runs(results: Results, variant: str, seq_length: int, compare: str) -> list[Result]:
    """Return the runs of a variant; a reference's of equal time are those of equal steps."""
    is_reference = results.study.settings.reference_of(variant) is None
    return results.of(variant, seq_length, EQUAL_STEPS if is_reference else compare)


def _cell(runs: Sequence[Result], read: Read, show: Show) -> str | Cell:
    """Return a number of all seeds, with a link to the run it is from; memory that ran out is a result."""
    values = [value for one in runs if (value := read(one)) is not None]
    link = f"runs/{runs[0].run.name}/" if runs else None
    if not values:
        ended = next((one.outcome for one in runs if one.outcome is not None), None)
        return Cell("-" if ended is None else ended.status, link)
    return Cell(shown(values, show), link)


def _paired(runs: Sequence[Result], reference: Sequence[Result], read: Read) -> list[tuple[float, float]]:
    """Return a number of each run with that of the reference of the same seed."""
    by_seed = {one.run.seed: read(one) for one in reference}
    pairs = [(read(one), by_seed.get(one.run.seed)) for one in runs]
    return [(own, other) for own, other in pairs if own is not None and other is not None]


def _ratio(runs: Sequence[Result], reference: Sequence[Result], read: Read) -> str:
    ratios = [own / other for own, other in _paired(runs, reference, read) if other]
    return shown(ratios, lambda value: f"{value:.2f}x")


def _difference(
    runs: Sequence[Result],
    reference: Sequence[Result],
    read: Read,
    show: Show = lambda value: f"{value:+.4f}",
) -> str:
    return shown([own - other for own, other in _paired(runs, reference, read)], show)


def _exact_match(result: Result) -> float | None:
    records = (result.measured or {}).get("records")
    return None if records is None else records["exact_match"]["average"]


def _by_category(measured: dict[str, Any] | None, key: str) -> dict[str, float]:
    records = (measured or {}).get("records")
    if records is None:
        return {}
    return {**records[key]["by_category"], "average": records[key]["average"]}


def _three_digits(value: float) -> str:
    return f"{value:.3f}"


def _category_cell(column: Sequence[dict[str, float]], category: str, show: Show) -> str:
    return shown([found[category] for found in column if category in found], show)


def _text_value(measured: dict[str, Any] | None, text: str) -> float | str | None:
    found = (measured or {}).get("texts", {}).get(text)
    if found is None:
        return None
    return str(found["error"]) if "error" in found else float(found["perplexity"])


def _text_cell(values: Sequence[float | str | None]) -> str:
    """Return perplexities as one cell, or why there is none."""
    numbers = [value for value in values if isinstance(value, float)]
    if numbers:
        return shown(numbers, lambda value: f"{value:.2f}")
    return next((value for value in values if isinstance(value, str)), NONE)


def _answer(measured: dict[str, Any] | None, prompt: str) -> str:
    answer = (measured or {}).get("answers", {}).get(prompt)
    return NONE if answer is None else " ".join(answer.split()) or "(nothing)"
