"""Errors that a user can cause and fix; each message is one line: where, what was found, what is allowed,
what to do."""


class SparseLlamaError(Exception):
    """Base of every error that ends a command with one line and exit status 2."""


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
