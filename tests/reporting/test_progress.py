"""What takes a moment is not spoken of; what takes long is, in plain lines where there is no terminal."""

import io
import itertools

from rich.console import Console

from sparse_llama.reporting.progress import count_through


def lines(num_items: int, item_s: float, *, is_terminal: bool = False) -> str:
    """Return what is printed of items that take ``item_s`` each."""
    said, clock = io.StringIO(), itertools.count()
    console = Console(file=said, width=80, force_terminal=is_terminal, color_system=None)
    passed = count_through(
        range(num_items), num_items, "tokenising", console, now_s=lambda: next(clock) * item_s
    )
    assert list(passed) == list(range(num_items))
    return said.getvalue()


def test_a_moment_is_not_spoken_of():
    assert lines(100, 0.005) == ""
    assert lines(100, 0.005, is_terminal=True) == ""


def test_a_file_gets_a_line_after_a_second_and_then_one_every_ten():
    """31 items of 1 s: after 2 s one is done, with 30 left at 2 s each; then 12, 23."""
    assert lines(31, 1.0).splitlines() == [
        "tokenising 1/31  ETA 1m 00s",
        "tokenising 12/31  ETA 21s",
        "tokenising 23/31  ETA 8s",
    ]


def test_a_terminal_gets_a_live_line():
    shown = lines(4000, 0.01, is_terminal=True)
    assert "tokenising" in shown
    assert "/4000" in shown
    assert "ETA 1m" not in shown.replace("\r", "\n").splitlines()
