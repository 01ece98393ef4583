"""Errors that a user can cause and fix; each message is one line: where, what was found, what is allowed,
what to do. Only memory that ran out takes more than a line to explain."""

from typing import ClassVar


class SparseLlamaError(Exception):
    """Base of every error that ends a command with one line and ``exit_status``."""

    exit_status: ClassVar[int] = 2


class ConfigError(SparseLlamaError):
    """The JSON file or a flag is wrong."""


class DataError(SparseLlamaError):
    """A data set, a record or a tokenizer file is wrong."""


class ModelError(SparseLlamaError):
    """A base model is missing, incomplete, or not what its files claim."""


class CheckpointError(SparseLlamaError):
    """A checkpoint or an adapter is missing, damaged, or belongs to another run."""


class ExportError(SparseLlamaError):
    """An export would not compute what the adapted model computes."""


class OutOfMemoryError(SparseLlamaError):
    """A run needed more memory than there was; its message is several lines."""

    exit_status = 3


class StoppedError(SparseLlamaError):
    """A run was stopped before its end, and has saved: no mistake, and not done either."""

    exit_status = 4


class DivergedError(SparseLlamaError):
    """The loss of a run was no number, or worse than guessing, for too many steps."""


class RankLostError(SparseLlamaError):
    """Another rank of the job has ended, and this one cannot go on without it."""

    exit_status = 1


class BuildError(SparseLlamaError):
    """A library that DeepSpeed compiles at its first use is not there, and cannot be had."""


class OffloadError(SparseLlamaError):
    """What waits for the backward pass in host memory or on a drive cannot be put there, or got back."""
