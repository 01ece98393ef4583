"""JSON tables that other programs wrote, such as a model's ``config.json``: read, or refused in one line."""

import json
from pathlib import Path
from typing import Any

from sparse_llama.config.section import show_plain
from sparse_llama.errors import SparseLlamaError


def read_table(
    path: Path, refusal: type[SparseLlamaError], *, remedy: str = "copy it again"
) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Args:
        refusal: what is raised where there is none.
        remedy: what to do about a damaged one.

    Raises:
        FileNotFoundError: there is no such file, which may be right.
        SparseLlamaError: as ``refusal``: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        what = "cannot be read" if isinstance(error, OSError) else "not JSON"
        reason = error.strerror if isinstance(error, OSError) else show_plain(str(error))
        raise refusal(f"{path}: {what} ({reason}); {remedy}") from error
    if not isinstance(table, dict):
        raise refusal(f"{path}: holds a {type(table).__name__}; expected a table; {remedy}")
    return table
