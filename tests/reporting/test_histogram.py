"""Every length is in the bin of its numbers."""

import io
import random

import pytest
from rich.console import Console

from sparse_llama.reporting.histogram import make_bins, show_histogram

BAR = "\u2588"


@pytest.mark.parametrize(
    ("longest", "width", "count"), [(1, 1, 1), (12, 1, 12), (13, 2, 7), (93, 10, 10), (4871, 500, 10)]
)
def test_bins_are_of_one_round_width(longest: int, width: int, count: int):
    bins = make_bins([longest])
    assert [(one.first, one.last) for one in bins] == [
        (1 + place * width, (place + 1) * width) for place in range(count)
    ]
    assert [one.count for one in bins] == [0] * (count - 1) + [1]


def test_every_length_is_counted_once_where_it_belongs():
    lengths = [random.Random(3).randrange(1, 700) for _ in range(400)] + [1, 699]
    bins = make_bins(lengths)
    assert [one.count for one in bins] == [
        sum(one.first <= length <= one.last for length in lengths) for one in bins
    ]
    assert sum(one.count for one in bins) == 402
    assert make_bins([]) == []


def test_bars_are_as_long_as_their_counts_and_one_is_seen():
    said = io.StringIO()
    show_histogram("tokens", make_bins([1] * 96 + [2] * 48 + [4]), 3, Console(file=said, width=100))
    assert said.getvalue().splitlines() == [
        "tokens",
        f" 1-1  {BAR * 48} 96",
        f" 2-2  {BAR * 24} 48",
        " 3-3   0",
        " 4-4  \u2588 1  longer than 3",
        "",
    ]
