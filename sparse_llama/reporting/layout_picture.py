"""A layout drawn in the terminal: queries down, keys to the right, a shade for how much of a cell attends.

A cell counts against the pairs in it that a causal model has at all: full attention is an even triangle.
"""

from dataclasses import dataclass

import torch

LABEL_CHARACTERS = 8  # a token number of an axis, and a gap
MOST_ROWS = 48  # more do not fit a screen
UNICODE_SHADES = " \u00b7\u2591\u2592\u2593\u2588"
ASCII_SHADES = " .:+%#"
"""No earlier key; none attended to; up to a third, up to two thirds, more of them; all."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One head pattern over a row of tokens."""

    title: str
    shares: torch.Tensor
    """(rows, columns): share of a cell's causal token pairs that attend; NaN where it has none."""
    num_tokens: int
    row_tokens: int
    """Tokens of a cell from top to bottom."""
    column_tokens: int
    """Tokens of a cell from left to right."""
    token: int | None = None
    """A token whose row is marked."""


def fit_cells(num_blocks: int, width: int) -> tuple[int, int]:
    """Return rows and columns of blocks in a cell, so that a picture fits ``width`` characters.

    A character is about twice as high as it is wide: two are a square. A block gets a square of its own where
    there is room; otherwise a square is cut into two cells, and has a power of two of blocks on a side: the
    axes then have round numbers.
    """
    most = max(1, min((width - LABEL_CHARACTERS) // 2, MOST_ROWS))
    blocks = 1
    while blocks * most < num_blocks:
        blocks *= 2
    return blocks, max(1, blocks // 2)


def draw(picture: Picture, *, is_ascii: bool = False) -> str:
    """Return the picture as lines of text, without its title."""
    num_rows = len(picture.shares)
    shades = ASCII_SHADES if is_ascii else UNICODE_SHADES
    characters = 2 * picture.column_tokens // picture.row_tokens  # of a cell
    step = 8 if num_rows > 16 else 4  # rows from one number of an axis to the next
    numbers = range(0, num_rows, step)
    lines = [" " * LABEL_CHARACTERS + "".join(f"{row * picture.row_tokens:<{2 * step}}" for row in numbers)]
    for row, shares in enumerate(picture.shares.tolist()):
        label = str(row * picture.row_tokens) if row % step == 0 else ""
        is_marked = picture.token is not None and picture.token // picture.row_tokens == row
        cells = "".join(shades[_level(share)] * characters for share in shares)
        lines.append(f"{label:>{LABEL_CHARACTERS - 1}}{'>' if is_marked else ' '}{cells}")
    return "\n".join(line.rstrip() for line in lines)


def legend(picture: Picture, *, is_ascii: bool = False) -> str:
    """Return the two lines that explain a picture."""
    none, light, medium, dark, full = (ASCII_SHADES if is_ascii else UNICODE_SHADES)[1:]
    return (
        f"queries down, keys to the right, {picture.row_tokens} x {picture.column_tokens} tokens a cell\n"
        f"of its causal pairs attend: {none} none {light} up to 1/3 {medium} up to 2/3 {dark} more {full} all"
    )


def _level(share: float) -> int:
    """Return the index of a share's shade."""
    if share != share:
        return 0
    return 1 + (share > 0) + (share > 1 / 3) + (share > 2 / 3) + (share == 1)
