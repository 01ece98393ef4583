"""What the configuration's tests share: a document in a file, its run, or the line that refuses it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sparse_llama.config.run import Overrides, Run, load_run
from sparse_llama.errors import ConfigError

MICRO = {"train_micro_batch_size_per_gpu": 4}
"""The least that a document must hold."""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Mapping[str, Any] | str], Path]:
    """Return a function that writes a document, or text that should be one, to ``mine.json``."""

    def to_file(document: Mapping[str, Any] | str) -> Path:
        path = tmp_path / "mine.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
        return path

    return to_file


@pytest.fixture
def load(write: Callable[..., Path], tmp_path: Path) -> Callable[..., Run]:
    """Return a function that loads the run of a document, which needs no batch size of its own, and of
    flags."""

    def run_of(document: Mapping[str, Any] | str, world_size: int = 1, **flags: Any) -> Run:
        complete = isinstance(document, str) or any(key.startswith("train_") for key in document)
        path = write(document if complete else MICRO | dict(document))
        flags.setdefault("output_dir", tmp_path / "out")
        return load_run(path, Overrides(**flags), world_size)

    return run_of


@pytest.fixture
def refusal(load: Callable[..., Run], tmp_path: Path) -> Callable[..., str]:
    """Return a function that returns the line that refuses a document, without the file's name before it."""

    def line_of(document: Mapping[str, Any] | str, world_size: int = 1, **flags: Any) -> str:
        with pytest.raises(ConfigError) as refused:
            load(document, world_size, **flags)
        line = str(refused.value)
        assert line.isascii()
        assert "\n" not in line
        return line.removeprefix(f"{tmp_path / 'mine.json'}: ")

    return line_of
