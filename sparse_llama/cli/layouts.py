"""``launch/show_layout.py``: any configuration's layout as a picture, and what it is worth."""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_llama.cli.entry import is_main
from sparse_llama.cli.flags import Parser, make_room_for, parser
from sparse_llama.errors import ConfigError

if TYPE_CHECKING:
    from sparse_llama.cli.layout_report import View

MOST_PICTURES = 4  # in the terminal: random blocks may give every head a pattern of its own


def show_layout_parser(doc: str | None) -> Parser:
    """Return the parser of ``launch/show_layout.py``: whose layout, and what of it."""
    flags = parser(doc)
    whose = flags.add_argument_group("whose layout")
    whose.add_argument(
        "--ds_config", type=Path, metavar="FILE", help="JSON document of a run (default: the bundled demo)"
    )
    whose.add_argument(
        "--sparse_attention",
        metavar="JSON|MODE",
        help="instead of a file: the block, or a mode's name with its defaults",
    )
    whose.add_argument(
        "--seq_length",
        type=int,
        metavar="N",
        help="tokens of a row (default: the file's; without one 8192)",
    )
    whose.add_argument(
        "--num_heads",
        type=int,
        metavar="H",
        help="query heads (default: the model's, if it is on this machine; otherwise 32)",
    )
    whose.add_argument(
        "--num_layers",
        type=int,
        metavar="N",
        help="layers (default: the model's, if it is on this machine)",
    )
    whose.add_argument("--seed", type=int, metavar="N", help="of random blocks (default: the file's, or 42)")
    what = flags.add_argument_group("what of it")
    what.add_argument("--layer", type=int, metavar="I", help="one layer only, counted from 0")
    what.add_argument("--head", type=int, metavar="H", help="one query head only, counted from 0")
    what.add_argument("--token", type=int, metavar="T", help="say which tokens this one sees")
    what.add_argument(
        "--documents", metavar="N,N,...", help="lengths of the documents packed into the row, 300,500,224"
    )
    what.add_argument("--png", type=Path, metavar="FILE", help="draw it there too")
    return flags


def show_layout(arguments: argparse.Namespace) -> None:
    """Show layouts in the terminal, and as a PNG where one is asked for."""
    if not is_main():
        return  # one picture is one process' work
    from sparse_llama.cli.layout_choice import choose

    choice = choose(arguments)
    if arguments.png is not None:
        if all(group.sparsity is None for group in choice.groups):
            raise ConfigError(f"--png {arguments.png}: attention is dense, there is nothing to draw")
        make_room_for("--png", arguments.png)

    from sparse_llama.cli.layout_report import expectations, make_view  # a second: torch
    from sparse_llama.reporting.tables import show_table

    views = [None if group.sparsity is None else make_view(choice, group) for group in choice.groups]
    for group, view in zip(choice.groups, views, strict=True):
        if view is None:
            show_table(group.name, [("dense", "a token sees every token of its document before it")])
        else:
            show_table(group.name, view.rows())
            _draw(view, arguments.head, arguments.token)
    for title, rows in expectations(choice, [1.0 if view is None else view.density() for view in views]):
        show_table(title, rows)
    if arguments.png is not None:
        _save([view for view in views if view is not None], arguments)


def _draw(view: "View", head: int | None, token: int | None) -> None:
    """Print a view's pictures, and below each what the token sees in it."""
    from sparse_llama.reporting.layout_picture import UNICODE_SHADES, draw, fit_cells, legend

    is_ascii = not _can_print(UNICODE_SHADES)
    cells = fit_cells(view.num_blocks, shutil.get_terminal_size().columns)  # 80 where there is no terminal
    patterns = view.patterns(head)
    pictures = [view.picture(pattern, cells, token) for pattern in patterns[:MOST_PICTURES]]
    for pattern, picture in zip(patterns, pictures, strict=False):
        print(picture.title, draw(picture, is_ascii=is_ascii), sep="\n\n", end="\n\n")
        if token is not None:
            print(view.seen(pattern, token), end="\n\n")
    if len(patterns) > MOST_PICTURES:
        print(f"and {len(patterns) - MOST_PICTURES} more patterns; --head H shows that of a head\n")
    print(legend(pictures[0], is_ascii=is_ascii), end="\n\n")


def _save(views: "list[View]", arguments: argparse.Namespace) -> None:
    from sparse_llama.reporting.layout_png import MOST_PANELS, PANEL_CELLS, save_layouts

    panels = [(view, pattern) for view in views for pattern in view.patterns(arguments.head)]
    pictures = []
    for view, pattern in panels[:MOST_PANELS]:
        side = -(-view.num_blocks // PANEL_CELLS)
        picture = view.picture(pattern, (side, side), arguments.token)
        title = picture.title if len(views) == 1 else f"{view.group.name}: {picture.title}"
        pictures.append(replace(picture, title=title))
    save_layouts(pictures, arguments.png)
    left_out = len(panels) - len(pictures)
    print(f"{arguments.png}: drawn" + (f", without {left_out} more patterns" if left_out > 0 else ""))


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
