"""A study's report: ``report.md``, one self-contained ``report.html``, and the pictures of both.

Written from what is in the folder, as often as one likes: of a study that is not finished, what there is.
"""

from pathlib import Path

from sparse_llama.config.document import read_document
from sparse_llama.config.settings import Settings
from sparse_llama.reporting.page import Block, Code, Grid, Page, Picture, Section, Text, to_html, to_markdown
from sparse_llama.study.pictures import (
    loss_pictures,
    position_pictures,
    retrieval_errors,
    retrieval_pictures,
)
from sparse_llama.study.results import Results, read_results
from sparse_llama.study.runs import Study
from sparse_llama.study.settings import EQUAL_TIME
from sparse_llama.study.tables import (
    answers_table,
    baseline_table,
    category_table,
    cost_table,
    perplexity_table,
    status_table,
    training_table,
)

_SCORES = {
    "exact_match": "Exact match of the answers to held-out records.",
    "rouge_l": "ROUGE-L of the same answers.",
}
"""By the key of what is measured."""


def write_report(study: Study, baseline: Study | None = None) -> list[Path]:
    """Write the report of what is in the study's folder; return its files."""
    results = read_results(study)
    page = Page(
        title=f"Study {study.name}",
        opening=_opening(results),
        sections=[
            *_corrected(study),
            *_training(results),
            *_curves(results),
            *_cost(results),
            *_quality(results),
            *_answers(results),
            *_baseline(results, baseline),
            Section("Runs", [status_table(results)]),
        ],
    )
    files = {"report.md": to_markdown(page), "report.html": to_html(page)}
    for name, text in files.items():
        (study.output_dir / name).write_text(text, encoding="utf-8")
    pictures = [block.file for part in page.sections for block in part.blocks if isinstance(block, Picture)]
    return [*(study.output_dir / name for name in files), *pictures]


def _opening(results: Results) -> list[Block]:
    study = results.study
    first = next(study.planned_runs())
    document = read_document(study.document_of(first))
    settings = Settings.parse(document.get("sparse_llama", {}), "sparse_llama")
    summaries = [one.summary for one in results.runs if one.summary is not None]
    words = (
        f"{len(study.settings.variants)} variants at {_list(study.settings.lengths)} tokens, seeds "
        f"{_list(study.settings.seeds)}: `{settings.model.path}` on `{settings.data.dataset}`. "
        f"{len(summaries)} of {len(results.runs)} runs are done."
    )
    begun = study.provenance
    if begun is None:
        return [Text(words)]
    versions = ", ".join(f"{name} {number}" for name, number in begun.versions.items())
    where = f"{begun.date}, commit {begun.git_commit or 'unknown'}; {begun.hardware}; {versions}."
    return [Text(words), Text(where), Code(begun.command)]


def _corrected(study: Study) -> list[Section]:
    rows = [[mistake, instead] for mistake, instead in study.settings.corrected.items()]
    if not rows:
        return []
    words = "The study repeats another, without its mistakes."
    return [Section("What is corrected", [Text(words), Grid(["there", "here"], rows, is_text=True)])]


def _training(results: Results) -> list[Section]:
    sections = []
    for seq_length in results.study.settings.lengths:
        blocks: list[Block] = [training_table(results, seq_length)]
        if EQUAL_TIME in results.study.settings.compare:
            blocks += [
                Text("At equal time: as many steps as fit into the time that the reference took."),
                training_table(results, seq_length, EQUAL_TIME),
            ]
        sections.append(Section(f"Training at {seq_length:,} tokens", blocks))
    return sections


def _curves(results: Results) -> list[Section]:
    pictures = loss_pictures(results)
    return [Section("Curves", pictures)] if pictures else []


def _cost(results: Results) -> list[Section]:
    settings = results.study.settings
    if len(settings.variants) < 2:
        return []
    words = (
        "Each variant beside its reference of the same seed: tokens a second and peak memory as "
        "ratios, validation loss and exact match (percentage points) as differences. A lower loss is better."
    )
    return [
        Section(f"What sparsity costs at {length:,} tokens", [Text(words), cost_table(results, length)])
        for length in settings.lengths
    ]


def _quality(results: Results) -> list[Section]:
    sections = []
    for seq_length in results.study.settings.lengths:
        blocks: list[Block] = []
        for key, words in _SCORES.items():
            table = category_table(results, seq_length, key)
            blocks += [] if table is None else [Text(words), table]
        perplexities = perplexity_table(results, seq_length)
        if perplexities is not None:
            blocks += [Text(f"Perplexity over windows of {seq_length:,} tokens."), perplexities]
        blocks += [*position_pictures(results, seq_length), *retrieval_pictures(results, seq_length)]
        blocks += [
            Text(f"Retrieval was not measured: {why}") for why in retrieval_errors(results, seq_length)
        ]
        if blocks:
            sections.append(Section(f"Quality at {seq_length:,} tokens", blocks))
    return sections


def _answers(results: Results) -> list[Section]:
    table = answers_table(results, results.study.settings.lengths[-1])
    return [] if table is None else [Section("Answers to the same prompts", [table])]


def _baseline(results: Results, baseline: Study | None) -> list[Section]:
    if baseline is None:
        return []
    table = baseline_table(results, read_results(baseline))
    words = "has no run of the same name." if table is None else "and this study, where runs have one name."
    blocks: list[Block] = [Text(f"`{baseline.output_dir}` {words}")]
    return [Section("Beside the baseline", blocks if table is None else [*blocks, table])]


def _list(values: tuple[int, ...]) -> str:
    return " and ".join(f"{value:,}" for value in values)
