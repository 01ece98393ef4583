"""The runs of a study: each a document of its own in the study's folder, all checked before the first
starts."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_llama.benchmark.provenance import Provenance
from sparse_llama.config.deepspeed import check_document
from sparse_llama.config.document import read_document
from sparse_llama.config.run import EMBEDDED, Overrides, Run, load_run
from sparse_llama.errors import ConfigError
from sparse_llama.study.settings import EQUAL_STEPS, EQUAL_TIME, StudySettings

BASE = "base"
"""The variant that trains nothing: the base model, measured as the runs are."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    variant: str
    seq_length: int
    seed: int
    compare: str = EQUAL_STEPS

    @property
    def name(self) -> str:
        """Of its folder."""
        name = f"{self.variant}_{self.seq_length}_seed{self.seed}"
        return name if self.compare == EQUAL_STEPS else f"{name}_{self.compare}"


@dataclass(frozen=True)
class Study:
    """A study in its folder."""

    name: str
    settings: StudySettings
    documents: Path
    """The folder that the path of the runs' document is relative to."""
    output_dir: Path
    num_ranks: int = 1
    provenance: Provenance | None = None
    """Of the call that began it."""

    def folder_of(self, run: StudyRun) -> Path:
        """Return where a run leaves what it has measured."""
        return self.output_dir / "runs" / run.name

    def document_of(self, run: StudyRun) -> Path:
        """Return the file of a run's document."""
        return self.output_dir / "configs" / f"{run.name}.json"

    def base_folder(self, seq_length: int) -> Path:
        """Return where the base's measurements over windows of ``seq_length`` are."""
        return self.output_dir / "runs" / f"{BASE}_{seq_length}"

    def planned_runs(self) -> Iterator[StudyRun]:
        """Return the runs of equal steps, the shortest first, all variants of a length and seed together."""
        for seq_length in self.settings.lengths:
            for seed in self.settings.seeds:
                for variant in self.settings.variants:
                    yield StudyRun(variant, seq_length, seed)

    def all_runs(self) -> list[StudyRun]:
        """Return every run: those of equal time stand behind the runs that they are measured by."""
        planned = list(self.planned_runs())
        if EQUAL_TIME not in self.settings.compare:
            return planned
        others = [run for run in planned if self.settings.reference_of(run.variant) is not None]
        return planned + [StudyRun(one.variant, one.seq_length, one.seed, EQUAL_TIME) for one in others]

    def check(self, *, is_anew: bool = False) -> dict[StudyRun, Run]:
        """Return every run of equal steps as it is resolved.

        Args:
            is_anew: whether runs of other documents may be in the folder, as they are to be replaced.

        Raises:
            ConfigError: what is wrong with one of them, before any has started.
        """
        return {run: self._resolve(run, is_anew=is_anew) for run in self.planned_runs()}

    def write_document(self, run: StudyRun, steps: int | None = None, *, is_anew: bool = False) -> Path:
        """Write the document of ``run``, in place of its length that of ``steps``; return the file.

        Raises:
            ConfigError: the run has been there before, by another document.
        """
        path, content = self.document_of(run), json.dumps(self._content(run, steps), indent=2) + "\n"
        was_there = (self.folder_of(run) / "run.json").is_file() and path.is_file() and not is_anew
        if was_there and path.read_text(encoding="utf-8") != content:
            raise ConfigError(
                f"{path}: the run was of another document than it is of now (what is in {self._source(run)} "
                "has changed); start anew with --overwrite, or name another folder with --output_dir"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return path

    def _resolve(self, run: StudyRun, *, is_anew: bool) -> Run:
        try:  # before the document is written: what has no place in a file, such as a key, must not get there
            check_document(self._content(run, None))
        except ConfigError as error:
            raise ConfigError(f"{self.name}: run {run.name}: {error}") from None
        path = self.write_document(run, is_anew=is_anew)
        flags = Overrides(output_dir=self.folder_of(run))
        try:
            return load_run(path, flags, self.num_ranks, is_main=False)
        except ConfigError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise ConfigError(f"{self.name}: run {run.name}: {reason} (its document is {path})") from None

    def _source(self, run: StudyRun) -> Path:
        named = self.settings.variants[run.variant].ds_config or self.settings.ds_config
        return EMBEDDED if named is None else self.documents / named

    def _content(self, run: StudyRun, steps: int | None) -> dict[str, Any]:
        try:
            content = read_document(self._source(run))
        except ConfigError as error:
            raise ConfigError(f"{self.name}: ds_config of {run.variant}: {error}") from None
        merge(content, self.settings.changes)
        merge(content, self.settings.variants[run.variant].changes)
        merge(content, self.settings.changes_at.get(str(run.seq_length), {}))
        if not isinstance(content.get("sparse_llama", {}), dict):
            return content  # refused when it is checked; a length put in its place would hide it
        merge(content, {"sparse_llama": {"seq_length": run.seq_length, "seed": run.seed}})
        if steps is not None:
            merge(content, {"sparse_llama": {"training": {"steps": steps, "epochs": None}}})
        return content


def merge(document: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put ``changes`` into ``document``: objects key by key, all else in whole; null takes a key out."""
    for key, value in changes.items():
        if value is None:
            document.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(document.get(key), dict):
            merge(document[key], value)
        else:
            document[key] = copy.deepcopy(dict(value) if isinstance(value, Mapping) else value)
