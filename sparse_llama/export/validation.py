"""The records that a run was validated on: what leaving out a part of its model costs is measured there."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_llama.config.document import read_document
from sparse_llama.config.settings import DataSettings, Settings, check_dataset
from sparse_llama.data.encode import encode_example
from sparse_llama.data.ledger import Ledger, Tally
from sparse_llama.data.packing import IGNORED
from sparse_llama.data.split import read_examples
from sparse_llama.data.template import with_template
from sparse_llama.data.tokenizer import load_tokenizer
from sparse_llama.errors import ConfigError, DataError
from sparse_llama.export.left_out import Part, Parts
from sparse_llama.export.source import Source

_RUN = "run.json"


@dataclass(frozen=True)
class HeldOut:
    """Documents one after the other; each is read alone."""

    source: str
    ids: torch.Tensor
    labels: torch.Tensor
    """Not shifted; -100 is not scored."""
    lengths: torch.Tensor

    @property
    def num_labelled(self) -> int:
        return int((self.labels != IGNORED).sum())

    def job(self) -> dict[str, torch.Tensor]:
        """Return the tensors by the names of ``reopen.loss_sum``'s arguments."""
        return {"ids": self.ids, "labels": self.labels, "lengths": self.lengths}


@dataclass(frozen=True)
class Losses:
    """What an export costs, in nats per labelled token."""

    source: str
    num_tokens: int
    trained: float
    """Of the adapted model as it was trained."""
    exported: float

    def rows(self) -> list[tuple[str, str]]:
        """Return both for a table."""
        return [
            ("validated on", f"{self.source}; {self.num_tokens:,} tokens"),
            ("validation loss, as trained", f"{self.trained:.4f}"),
            ("validation loss, as exported", f"{self.exported:.4f}"),
        ]


def read_for(source: Source, left_out: Parts, *, asked: Collection[Part], data: str | None) -> HeldOut | None:
    """Return what to measure a loss on; None where nothing is left out of the export.

    Args:
        asked: what was to be left out, whether it was there or not.
        data: of ``--data``: a data set with validation records of its own gives those, another all it has.
            None is the validation data of the adapter's run, whose ``run.json`` stands above it.

    Raises:
        ConfigError: no data is named and the adapter is not in a run's folder, or it is named though nothing
            was to be left out.
        DataError: there is no such data, or nothing in it has a label.
    """
    if data is not None and not asked:
        raise ConfigError(
            "--data: is what --drop_prompt, --drop_head_bias and --dense_attention are measured on; without "
            "them there is nothing to measure"
        )
    return _read(source, data) if left_out else None


def _read(source: Source, data: str | None) -> HeldOut:
    where, settings = _run_data(source.adapter) if data is None else ("--data", _named_data(data))
    file = source.file
    ledger = Ledger(file.seq_length, is_packed=False)
    tokenizer, tally = with_template(load_tokenizer(source.base), source.base, file.template), Tally()
    try:
        _, examples = read_examples(settings, ledger, tokenizer)
    except DataError as error:
        hint = "" if data is not None else "; name other data to measure on with --data"
        raise DataError(f"{where}: {error}{hint}") from error
    documents = [
        document
        for example in examples
        for document in encode_example(example, tokenizer, file.seq_length, tally)
        if any(label != IGNORED for label in document.labels[1:])
    ]
    if not documents:
        raise DataError(
            f"{where}: no response of {ledger.validation_source} fits in {file.seq_length} tokens"
        )
    name, part = settings.validation or settings.dataset, ledger.validation_source
    return HeldOut(
        part if part.startswith(name) else f"{name}, {part}",
        torch.tensor([token for document in documents for token in document.ids]),
        torch.tensor([label for document in documents for label in document.labels]),
        torch.tensor([len(document.ids) for document in documents]),
    )


def _run_data(adapter: Path) -> tuple[str, DataSettings]:
    """Return the data of the run that an adapter/ or a checkpoints/step_NNNNNN folder is of."""
    adapter = adapter.resolve()
    for folder in (adapter, adapter.parent, adapter.parent.parent):
        path = folder / _RUN
        if path.is_file():
            try:
                settings = Settings.parse(read_document(path).get("sparse_llama"), "sparse_llama")
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}; name data to measure on with --data") from error
            return str(path), settings.data
    raise ConfigError(
        f"--data: {adapter} is not in a run's folder (no {_RUN}), so there are no validation records to tell "
        "what leaving something out costs; name a data set or a file"
    )


def _named_data(data: str) -> DataSettings:
    try:
        name = check_dataset(data)
    except ValueError as error:
        raise ConfigError(f"--data: {error}") from None
    return DataSettings(dataset=name, validation=name)
