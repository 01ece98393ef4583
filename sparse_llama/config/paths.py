"""Paths as people give them, which may be anything: of a user that is not, too long, below a file, a loop.

``pathlib`` (3.11) raises for some: OSError for a name of 300 characters, RuntimeError for ``~nobody``. To
everyone who asks whether something is there, they are not there.
"""

import os
import re
from pathlib import Path


def expand(name: str | Path) -> Path:
    """Return ``name`` with ``~`` as the user's folder; one that cannot be told stays as it is written."""
    return Path(os.path.expanduser(name))


def is_url(name: str) -> bool:
    """Return whether ``name`` is an address such as ``https://host/x``: no model and no data set here."""
    return "://" in name


def without_secrets(name: str) -> str:
    """Return ``name`` without the user and the password that an address can hold, for messages and files."""
    return re.sub(r"://[^/\s]*@", "://***@", name)


def exists(path: Path) -> bool:
    """Return whether anything is at ``path``."""
    return os.path.exists(path)


def is_folder(path: Path) -> bool:
    """Return whether a folder is at ``path``."""
    return os.path.isdir(path)


def is_file(path: Path) -> bool:
    """Return whether a file is at ``path``."""
    return os.path.isfile(path)
