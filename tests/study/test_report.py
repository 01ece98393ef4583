"""A report of made-up runs: every number in its place, Markdown and HTML with the same, HTML without help."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from study.fabricated import fabricate, leave, measured, summary

from sparse_llama.study.report import write_report
from sparse_llama.study.runs import Study, StudyRun

DENSE = [1.0, 1.2, 1.1]
"""Validation losses of three seeds."""
SPARSE = [1.5, 1.4, 1.3]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Dense runs of three seeds, sparse runs of which the last seed's ran out of memory."""
    made = fabricate(tmp_path)
    for seed, (dense, sparse) in enumerate(zip(DENSE, SPARSE, strict=True), start=1):
        leave(
            made,
            StudyRun("dense", 128, seed),
            summary=summary(validation_loss=dense, elapsed_s=60.0 * seed),
            measured=measured(0.5, 12.0 + seed, "a fox"),
            losses=[3.0, 2.0, dense],
        )
        if seed == 3:
            break
        for compare, loss in (("equal_steps", sparse), ("equal_time", sparse - 0.25)):
            leave(
                made,
                StudyRun("sparse", 128, seed, compare),
                summary=summary(
                    validation_loss=loss,
                    density=0.25,
                    tokens_per_s=300.0,
                    peak_memory_bytes={"gpu": 0, "host": 2**29},
                ),
                measured=measured(0.25, "no network", "a hen"),
                losses=[3.0, 2.5, loss],
            )
    leave(made, StudyRun("sparse", 128, 3), status="out of memory", reason="9 GiB more asked for")
    base = made.base_folder(128)
    base.mkdir(parents=True)
    (base / "measured.json").write_text(json.dumps(measured(0.0, 99.0, "")), encoding="utf-8")
    return made


class Tables(HTMLParser):
    """Reads the cells of every table, what is linked and what is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self._is_in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._is_in_cell = True
        elif tag == "a":
            self.links.append(found["href"] or "")
        self.loaded += [value or "" for name, value in attrs if name in ("src", "srcset", "data", "action")]
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag: str) -> None:
        self._is_in_cell = self._is_in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._is_in_cell:
            self.tables[-1][-1][-1] += data


def html_of(study: Study) -> Tables:
    found = Tables()
    found.feed((study.output_dir / "report.html").read_text(encoding="utf-8"))
    return found


def markdown_tables(study: Study) -> list[list[list[str]]]:
    """Return the cells of every table, links without their targets."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in (study.output_dir / "report.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            tables.append([])
        inside = True
        cells = line.replace("\\|", "\0").strip()[1:-1].split("|")
        if not set(line) <= set("|- "):
            tables[-1].append([cell.replace("\0", "|").strip() for cell in cells])
    return tables


def table(study: Study, *header: str) -> dict[str, list[str]]:
    """Return the rows of the first HTML table whose header begins so, by their first cell."""
    found = next(one for one in html_of(study).tables if one[0][: len(header)] == list(header))
    return {row[0]: row[1:] for row in found[1:]}


def test_a_cell_is_the_median_of_the_seeds_and_their_spread(study: Study):
    write_report(study)
    rows = table(study, "", "dense", "sparse")
    assert rows["validation loss, trained"] == ["1.1000 (1.0000 to 1.2000)", "1.4500 (1.4000 to 1.5000)"]
    assert rows["training time"] == ["2m 00s (1m 00s to 3m 00s)", "1m 00s"]
    assert rows["peak memory"] == ["1.0 GiB", "512.0 MiB"]
    assert rows["density of attention"] == ["1.00", "0.25"]


def test_a_variant_is_compared_with_the_reference_of_the_same_seed(study: Study):
    write_report(study)
    rows = table(study, "", "beside", "density", "speed")
    assert rows["sparse"] == [
        "dense",
        "0.25",
        "3.00x",
        "0.50x",
        "+0.3500 (+0.2000 to +0.5000)",
        "+0.1000 (-0.0500 to +0.2500)",
        "-25",
        "-25",
    ]
    assert list(rows) == ["sparse"], "a reference is compared with nothing"


def test_quality_and_answers_stand_beside_the_bases(study: Study):
    write_report(study)
    assert table(study, "category")["qa"] == ["0%", "50%", "25%"]
    overlaps = [one for one in html_of(study).tables if one[0][0] == "category"][1]
    assert overlaps[1] == ["qa", "0.750", "0.750", "0.750"]
    texts = table(study, "text")
    assert texts["wikitext2"] == ["99.00", "14.00 (13.00 to 15.00)", "no network"]
    assert texts["mine.txt"] == ["7.00", "7.00", "7.00"]
    answers = next(one for one in html_of(study).tables if one[0][0] == "prompt")
    assert answers[1:] == [
        ["Who | what?", "base", "(nothing)"],
        ["", "dense", "a fox"],
        ["", "sparse", "a hen"],
    ]


def test_memory_that_ran_out_is_a_result(study: Study):
    write_report(study)
    runs = table(study, "run", "")
    assert runs["sparse_128_seed3"] == ["out of memory", "9 GiB more asked for"]
    assert runs["sparse_128_seed3_equal_time"] == ["not run yet", ""]
    assert runs["dense_128_seed1"] == ["done", "deepspeed dense_128_seed1"]


def test_a_run_that_could_not_be_measured_says_why(tmp_path: Path):
    study = fabricate(tmp_path, seeds=[1], compare=["equal_steps"])
    run = StudyRun("dense", 128, 1)
    leave(study, run, summary=summary(), losses=[2.0, 1.5])
    outcome = {"status": "out of memory", "reason": "8 GiB more asked for", "command": ""}
    (study.folder_of(run) / "measure_outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
    write_report(study)
    runs = table(study, "run", "")
    assert runs["dense_128_seed1"] == ["done", "not measured, out of memory: 8 GiB more asked for"]


def test_retrieval_that_cannot_be_says_why_once(tmp_path: Path):
    study = fabricate(tmp_path, seeds=[1], compare=["equal_steps"])
    for variant in ("dense", "sparse"):
        found = measured(0.5, 2.0, "a fox") | {"retrieval": {"error": "--lengths: 4 tokens are too few"}}
        leave(study, StudyRun(variant, 128, 1), summary=summary(), measured=found, losses=[2.0, 1.5])
    files = write_report(study)
    text = files[0].read_text(encoding="utf-8")
    assert text.count("Retrieval was not measured: --lengths: 4 tokens are too few") == 1
    assert not any("retrieval" in file.name for file in files)


def test_all_of_a_variant_out_of_memory_is_what_its_cells_say(tmp_path: Path):
    study = fabricate(tmp_path, seeds=[1], compare=["equal_steps"])
    leave(study, StudyRun("dense", 128, 1), status="out of memory", reason="9 GiB more asked for")
    leave(study, StudyRun("sparse", 128, 1), summary=summary(), losses=[2.0, 1.5])
    write_report(study)
    assert table(study, "", "dense", "sparse")["train loss (average)"] == ["out of memory", "2.0000"]


def test_markdown_has_the_tables_of_the_html(study: Study):
    write_report(study)
    written = [
        [[re.sub(r"\[(.*)\]\(.*\)", r"\1", cell).replace("`", "") for cell in row] for row in one]
        for one in markdown_tables(study)
    ]
    assert written == html_of(study).tables


def test_the_html_needs_nothing_else_and_every_link_leads_somewhere(study: Study):
    files = write_report(study)
    found = html_of(study)
    pictures = [file for file in files if file.suffix == ".png"]
    assert [file.name for file in pictures] == [
        "losses.png",
        "positions_128_records.png",
        "positions_128_0.png",
        "positions_128_1.png",
        "retrieval_exact_128.png",
        "retrieval_loss_128.png",
    ]
    decoded = [base64.b64decode(one.removeprefix("data:image/png;base64,")) for one in found.loaded]
    assert decoded == [file.read_bytes() for file in pictures]
    assert found.links
    missing = [link for link in found.links if not (study.output_dir / link).is_dir()]
    assert set(missing) <= {"runs/sparse_128_seed3_equal_time/"}, "which has not begun"


def test_a_study_that_has_hardly_begun_has_a_report(tmp_path: Path):
    study = fabricate(tmp_path)
    files = write_report(study)
    assert [file.name for file in files] == ["report.md", "report.html"]
    assert "0 of 9 runs are done" in files[0].read_text(encoding="utf-8")


def test_what_was_not_asked_for_is_not_there(tmp_path: Path):
    study = fabricate(tmp_path, seeds=[1], compare=["equal_steps"], evaluation={})
    nothing = {"texts": {}, "records": None, "answers": {}, "retrieval": None}
    for variant in ("dense", "sparse"):
        leave(study, StudyRun(variant, 128, 1), summary=summary(), measured=nothing, losses=[2.0, 1.5])
    files = write_report(study)
    assert [file.name for file in files] == ["report.md", "report.html", "losses.png"]
    text = files[0].read_text(encoding="utf-8")
    assert "Quality" not in text
    assert "Answers" not in text


def test_another_study_is_compared_run_by_run(study: Study, tmp_path: Path):
    other = fabricate(tmp_path / "other", seeds=[1])
    leave(other, StudyRun("dense", 128, 1), summary=summary(validation_loss=2.0, tokens_per_s=50.0))
    write_report(study, baseline=other)
    rows = table(study, "run", "parameters tuned")
    assert list(rows) == ["dense_128_seed1"]
    assert "2.0000 -> 1.0000 (-50.0%)" in rows["dense_128_seed1"]
    assert "50 -> 100 (+100.0%)" in rows["dense_128_seed1"]


def test_what_is_corrected_is_named(tmp_path: Path):
    study = fabricate(tmp_path, corrected={"It never loaded the base.": "Here it does."})
    write_report(study)
    assert table(study, "there", "here") == {"It never loaded the base.": ["Here it does."]}
