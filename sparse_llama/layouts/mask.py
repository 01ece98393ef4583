"""A layout from a file: which block sees which, as somebody drew it."""

from typing import TYPE_CHECKING

import torch

from sparse_llama.config.mask_file import mask_name, open_mask
from sparse_llama.config.sparsity import MaskSparsity
from sparse_llama.errors import ConfigError
from sparse_llama.layouts.drawing import Drawing
from sparse_llama.layouts.intervals import Triple

if TYPE_CHECKING:
    from sparse_llama.config.mask_file import Table

_CELLS_AT_ONCE = 2**24


def draw_mask(sparsity: MaskSparsity, num_heads: int, num_blocks: int) -> tuple[list[Drawing], list[int]]:
    """Return the distinct layouts in a mask's first ``num_blocks`` rows and columns, and which each head has.

    Raises:
        ConfigError: the file is no mask, of another number of heads, or has a row without its own block.
    """
    tables = open_mask(sparsity, num_blocks)[..., :num_blocks, :num_blocks]
    if tables.ndim == 2:
        tables = tables[None]
    elif len(tables) != num_heads:
        raise ConfigError(
            f"{mask_name(sparsity)}: made for {len(tables)} heads, the model has {num_heads}; save a table "
            "for each, or one of shape (N, N) for all"
        )
    found: dict[tuple[bytes, ...], int] = {}
    drawings: list[Drawing] = []
    head_patterns: list[int] = []
    for head, table in enumerate(tables):
        is_own = table.diagonal()
        if not is_own.all():
            raise ConfigError(
                f"{mask_name(sparsity)}: block {int(is_own.argmin())} of head {head} does not see itself; "
                "set the diagonal, for a token sees at least itself"
            )
        rows = _list_rows(table)
        key = tuple(tensor.numpy().tobytes() for tensor in rows)
        if key not in found:
            found[key] = len(drawings)
            drawings.append(Drawing(num_blocks, (rows,)))
        head_patterns.append(found[key])
    return drawings, head_patterns * (num_heads // len(head_patterns))


def _list_rows(table: "Table") -> Triple:
    """Return the runs of an (N, N) table, some rows of it in memory at a time."""
    height = max(1, _CELLS_AT_ONCE // len(table))
    parts: list[Triple] = []
    for first in range(0, len(table), height):
        cells = torch.tensor(table[first : first + height]).to(torch.int8)
        edges = torch.zeros(len(cells), cells.shape[1] + 1, dtype=torch.int8)
        edges[:, :-1] += cells
        edges[:, 1:] -= cells
        rows, starts = (edges == 1).nonzero(as_tuple=True)
        ends = (edges == -1).nonzero(as_tuple=True)[1]
        parts.append((rows + first, starts, ends))
    rows, starts, ends = (torch.cat([part[index] for part in parts]) for index in range(3))
    return rows, starts, ends
