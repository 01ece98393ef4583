"""``launch/study.py``: several runs on the same data and hyperparameters, and a report that compares them."""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_llama.cli.entry import is_main
from sparse_llama.cli.flags import Parser, parser
from sparse_llama.cli.results import make_folder, numbers, tell_files
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from sparse_llama.config.run import Run
    from sparse_llama.study.runner import Outcome
    from sparse_llama.study.runs import Study, StudyRun
    from sparse_llama.study.settings import StudySettings

_SAVED = "study.json"
_IDENTITY = ("name", "settings", "num_ranks")
"""What two calls must have in common for one to go on where the other stopped; each run's document, too."""


def study_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/study.py``: which runs, and where they go."""
    flags = parser(doc)
    add = flags.add_argument
    add("--preset", metavar="NAME|FILE", help="a study of ds_configs/studies, or a document of your own")
    add(
        "--ds_configs",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="compare these runs' documents instead, each by the name of its file",
    )
    add("--lengths", metavar="N,N,...", help="tokens of a row (default: the study's, or the documents' own)")
    add("--seeds", metavar="N,N,...", help="default: the study's, or 42")
    add("--ranks", type=int, default=1, metavar="N", help="processes of each run")
    add("--output_dir", type=Path, metavar="DIR", help="default: studies/NAME")
    add("--overwrite", action="store_true", help="replace the study in the output folder")
    add("--only_report", action="store_true", help="write the report of what is there, and run nothing")
    add("--baseline", type=Path, metavar="DIR", help="another study's folder, to compare this one with")
    return flags


def study(arguments: argparse.Namespace) -> None:
    """Run what is not there yet, and write the report.

    Raises:
        ConfigError: the study, one of its runs or a flag is wrong, or the folder holds another study.
    """
    if not is_main():
        return  # each run starts its own processes
    from sparse_llama.study.live import LiveStudy
    from sparse_llama.study.report import write_report

    made = _begun(_make(arguments), is_anew=arguments.overwrite)
    _refuse_other(made, is_anew=arguments.overwrite)
    make_folder(made.output_dir)
    resolved = made.check(is_anew=arguments.overwrite)
    _claim(made, is_anew=arguments.overwrite)
    baseline = None if arguments.baseline is None else reopen(arguments.baseline)
    live = LiveStudy(made)
    if not arguments.only_report:
        scripts = Path(os.path.relpath(Path(sys.argv[0]).resolve().parent))
        with live.showing():
            _Conductor(made, resolved, scripts, live).all_runs()
    live.show()
    tell_files(write_report(made, baseline))


class _Conductor:
    """Trains and measures, one job after the other, what an earlier call has not."""

    def __init__(self, made: "Study", resolved: "dict[StudyRun, Run]", scripts: Path, live: Any) -> None:
        self._study, self._resolved, self._scripts, self._live = made, resolved, scripts, live
        self._tried: set[Path] = set()
        """Folders of bases that were measured, or could not be."""

    def all_runs(self) -> None:
        """Go through every run, the base of a length before its first."""
        from sparse_llama.study.settings import EQUAL_STEPS

        for run in self._study.all_runs():
            self._measure_base(run)
            steps = None if run.compare == EQUAL_STEPS else self._steps_of_equal_time(run)
            if run.compare == EQUAL_STEPS or steps is not None:
                self._train(run, steps)
                self._measure(run)

    def _train(self, run: "StudyRun", steps: int | None) -> None:
        from sparse_llama.study.runner import read_outcome, train

        known = read_outcome(self._study.folder_of(run))
        if known is not None and known.is_final:
            return
        self._live.begin(run.name, "training")
        self._tell(train(self._study, run, self._scripts, self._live.refresh, steps=steps))

    def _measure(self, run: "StudyRun") -> None:
        from sparse_llama.study.measure import RESULT

        folder = self._study.folder_of(run)
        if (folder / "summary.json").is_file() and not (folder / RESULT).is_file():
            self._measure_in(folder, run, adapter=str(folder))

    def _measure_base(self, run: "StudyRun") -> None:
        from sparse_llama.study.measure import RESULT

        folder = self._study.base_folder(run.seq_length)
        if folder not in self._tried and not (folder / RESULT).is_file():
            self._tried.add(folder)
            self._measure_in(folder, run, adapter=None)

    def _measure_in(self, folder: Path, run: "StudyRun", adapter: str | None) -> None:
        from sparse_llama.study.runner import measure
        from sparse_llama.study.runs import StudyRun
        from sparse_llama.study.settings import EQUAL_STEPS

        plain = StudyRun(run.variant, run.seq_length, run.seed, EQUAL_STEPS)
        settings = self._resolved[plain].settings
        order = {
            "model": settings.model.path,
            "adapter": adapter,
            "template": settings.data.template,
            "window": run.seq_length,
            "dataset": settings.data.validation or settings.data.dataset,
            "evaluation": self._study.settings.evaluation.model_dump(mode="json"),
        }
        self._live.begin(folder.name, "measuring")
        self._tell(measure(folder, order, self._live.refresh))

    def _tell(self, outcome: "Outcome") -> None:
        self._live.end(f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status)

    def _steps_of_equal_time(self, run: "StudyRun") -> int | None:
        """Return the steps with which ``run`` takes as long as the reference took; None where either has
        not come to its end."""
        from sparse_llama.study.results import read_results
        from sparse_llama.study.settings import EQUAL_STEPS

        results = read_results(self._study)

        def summary(variant: str) -> dict[str, Any] | None:
            runs = results.of(variant, run.seq_length, EQUAL_STEPS)
            return next((one.summary for one in runs if one.run.seed == run.seed), None)

        named = self._study.settings.reference_of(run.variant)
        reference, own = None if named is None else summary(named), summary(run.variant)
        if reference is None or own is None:
            return None
        return max(1, round(own["steps"] * reference["elapsed_s"] / own["elapsed_s"]))


def reopen(folder: Path) -> "Study":
    """Return the study that an earlier call has left in a folder.

    Raises:
        ConfigError: there is none, or its file is damaged.
    """
    from sparse_llama.benchmark.provenance import Provenance
    from sparse_llama.study.runs import Study
    from sparse_llama.study.settings import StudySettings

    file = folder / _SAVED
    if not file.is_file():
        raise ConfigError(f"{folder}: holds no study ({_SAVED} is not there); name a study's output folder")
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        settings = StudySettings.parse(saved["settings"])
        begun = Provenance(**saved["provenance"])
        return Study(saved["name"], settings, Path(saved["documents"]), folder, saved["num_ranks"], begun)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: no readable study ({type(error).__name__}: {error})") from None


def _make(arguments: argparse.Namespace) -> "Study":
    from sparse_llama.study.runs import Study
    from sparse_llama.study.settings import read_study

    if (arguments.preset is None) == (arguments.ds_configs is None):
        raise ConfigError("--preset or --ds_configs: give one of them, the study or the documents to compare")
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks: must be >= 1, got {arguments.ranks}")
    if arguments.preset is not None:
        file = _find(arguments.preset)
        name, settings, documents = file.stem, read_study(file), file.parent
    else:
        name, settings, documents = "comparison", _of_documents(arguments.ds_configs), Path()
    own: dict[str, Any] = {
        key: found for key in ("lengths", "seeds") if (found := numbers(key, getattr(arguments, key)))
    }
    settings = type(settings).parse(settings.model_dump() | own, "--lengths, --seeds")
    folder = arguments.output_dir or Path("studies") / name
    return Study(name, settings, documents, folder, arguments.ranks)


def _of_documents(files: list[Path]) -> "StudySettings":
    """Return the study of documents that have nothing in common but what is measured."""
    from sparse_llama.config.run import Overrides, load_run
    from sparse_llama.study.settings import StudySettings

    variants: dict[str, Any] = {}
    lengths: dict[int, None] = {}
    for file in files:
        if file.stem in variants:
            raise ConfigError(f"--ds_configs: two files are called {file.stem}; rename one of them")
        variants[file.stem] = {"ds_config": str(file.resolve())}
        lengths[load_run(file, Overrides(), 1, is_main=False, is_here=False).settings.seq_length] = None
    return StudySettings.parse({"variants": variants, "lengths": list(lengths)}, "--ds_configs")


def _find(preset: str) -> Path:
    """Return the file of a preset, by its name or its path."""
    from sparse_llama.config.section import suggest

    file = Path(preset)
    if file.suffix == ".json":
        return file
    folder = Path(sys.argv[0]).resolve().parents[1] / "ds_configs" / "studies"
    names = {path.stem: path for path in sorted(folder.glob("*.json"))}
    if preset not in names:
        raise ConfigError(f"--preset {preset}: no such study in {folder}{suggest(preset, names)}")
    return Path(os.path.relpath(names[preset]))


def _begun(made: "Study", *, is_anew: bool) -> "Study":
    """Return the study with where it comes from: what the call that began it has saved, or this call."""
    from sparse_llama.benchmark.provenance import provenance

    if not is_anew and (made.output_dir / _SAVED).is_file():
        return replace(made, provenance=reopen(made.output_dir).provenance)
    return replace(made, provenance=provenance("launch/study.py", sys.argv[1:]))


def _refuse_other(made: "Study", *, is_anew: bool) -> None:
    """Refuse a folder that holds another study.

    Raises:
        ConfigError: it does, and nobody said that it may be replaced.
    """
    file = made.output_dir / _SAVED
    if is_anew or not file.is_file():
        return
    saved, own = _content(reopen(made.output_dir)), _content(made)
    differing = ", ".join(sorted(key for key in _IDENTITY if saved[key] != own[key]))
    if differing:
        raise ConfigError(
            f"{made.output_dir}: holds another study (other {differing}); start anew with --overwrite, or "
            "name another folder with --output_dir"
        )


def _claim(made: "Study", *, is_anew: bool) -> None:
    """Make the folder this study's own."""
    from sparse_llama.training.metrics import write_json

    if is_anew and (made.output_dir / _SAVED).is_file():
        shutil.rmtree(made.output_dir / "runs", ignore_errors=True)
    write_json(made.output_dir / _SAVED, _content(made))


def _content(made: "Study") -> dict[str, Any]:
    return {
        "name": made.name,
        "settings": made.settings.model_dump(mode="json"),
        "documents": str(made.documents),
        "num_ranks": made.num_ranks,
        "provenance": None if made.provenance is None else asdict(made.provenance),
    }
