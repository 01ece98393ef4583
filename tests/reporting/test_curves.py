"""Curves are drawn: looked at by their pixels."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from sparse_llama.errors import ConfigError
from sparse_llama.reporting.curves import Curve, Panel, save_curves


def panel(*curves: Curve, is_log: bool = False) -> Panel:
    return Panel("a panel", "ms", curves, is_log=is_log)


def colors_of(file: Path) -> set[tuple[int, ...]]:
    red, green, blue = (imread(file)[..., :3] * 255).round().astype(int).reshape(-1, 3).T
    found = np.unique((red * 256 + green) * 256 + blue).tolist()
    return {(color >> 16, color >> 8 & 255, color & 255) for color in found}


def test_a_label_has_one_colour_in_all_panels_and_two_labels_have_two(tmp_path: Path):
    first, second = Curve("a", (1024, 2048), (1, 2)), Curve("b", (1024, 2048), (2, 3))
    blue, orange = (31, 119, 180), (255, 127, 14)  # matplotlib's first two
    save_curves([[panel(first), panel(first)]], "title", tmp_path / "one.png")
    save_curves([[panel(first), panel(second, first)]], "title", tmp_path / "two.png")
    assert blue in colors_of(tmp_path / "one.png")
    assert orange not in colors_of(tmp_path / "one.png")
    assert {blue, orange} <= colors_of(tmp_path / "two.png")


def test_quartiles_are_shaded_and_a_single_length_can_be_drawn(tmp_path: Path):
    plain = Curve("a", (1000,), (5.0,))
    banded = Curve("a", (1024, 2048), (5.0, 9.0), lower=(4.0, 7.0), upper=(7.0, 12.0))
    save_curves([[panel(plain, is_log=True)]], "title", tmp_path / "plain.png")
    save_curves([[panel(banded, is_log=True)]], "title", tmp_path / "banded.png")
    shade = {(r, g, b) for r, g, b in colors_of(tmp_path / "banded.png") if b - r > 25 and r > 200}
    assert shade - colors_of(tmp_path / "plain.png")


def test_a_length_without_a_value_is_a_cross_above_the_level_where_there_is_one(tmp_path: Path):
    """What ran out of memory has no peak; a curve that simply ended would look unmeasured."""
    for name, fails_at, level in (("cross", (2048,), 8.0), ("ended", (), 8.0), ("no_level", (2048,), None)):
        curve = Curve("a", (), (), fails_at=fails_at)
        made = Panel("a panel", "GiB", [Curve("b", (1024,), (1.0,)), curve], is_log=True, level=level)
        save_curves([[made]], "title", tmp_path / f"{name}.png")
    orange = (255, 127, 14)
    counts = {
        name: (np.round(imread(tmp_path / f"{name}.png")[..., :3] * 255) == orange).all(-1).sum()
        for name in ("cross", "ended", "no_level")
    }
    assert counts["cross"] > counts["ended"] == counts["no_level"]


def test_more_rows_make_a_taller_picture(tmp_path: Path):
    curve = Curve("a", (1024, 2048), (1, 2))
    save_curves([[panel(curve)]], "title", tmp_path / "one.png")
    save_curves([[panel(curve)], [panel(curve)]], "title", tmp_path / "two.png")
    one, two = (imread(tmp_path / name).shape for name in ("one.png", "two.png"))
    assert two[0] > 1.5 * one[0]
    assert two[1] == one[1]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be written"):
        save_curves([[panel(Curve("a", (8,), (1,)))]], "title", tmp_path / "missing" / "x.png")
