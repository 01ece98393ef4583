"""Heat maps and curves by position as PNGs: the colours and lengths that the numbers should have."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from sparse_llama.errors import ConfigError
from sparse_llama.reporting.heat_map_png import HeatMap, save_heat_maps
from sparse_llama.reporting.position_png import PositionCurve, save_by_position

NAMES = ("0%", "100%")


def draw(file: Path, *maps: HeatMap) -> np.ndarray:
    save_heat_maps(maps, "a model", file, row_label="depth", column_label="tokens")
    return imread(file)[..., :3]


def blue_map(values: list[list[float]], *, is_low_dark: bool = False) -> HeatMap:
    return HeatMap("share", NAMES, NAMES, values, highest=1.0, is_low_dark=is_low_dark)


def brightness(image: np.ndarray) -> float:
    """Return the mean brightness of the panel's middle, where its cells are."""
    height, width = image.shape[:2]
    return float(image[height // 3 : 2 * height // 3, width // 4 : width // 2].mean())


def test_high_values_are_dark_and_low_ones_bright_or_the_other_way_round(tmp_path):
    full, empty = [[1.0, 1.0]] * 2, [[0.0, 0.0]] * 2
    dark, bright = (brightness(draw(tmp_path / "a.png", blue_map(values))) for values in (full, empty))
    assert dark < 0.5 < 0.8 < bright
    reversed_map = blue_map(full, is_low_dark=True)
    assert brightness(draw(tmp_path / "b.png", reversed_map)) > 0.8


def test_maps_stand_side_by_side(tmp_path):
    one = draw(tmp_path / "one.png", blue_map([[0.5, 0.5]] * 2))
    two = draw(tmp_path / "two.png", *[blue_map([[0.5, 0.5]] * 2)] * 2)
    assert two.shape[0] == one.shape[0]
    assert two.shape[1] == pytest.approx(2 * one.shape[1], abs=2)


def test_more_cells_make_a_larger_picture(tmp_path):
    names = tuple(map(str, range(9)))
    large = HeatMap("share", names, names, [[0.5] * 9] * 9, highest=1.0)
    small, tall = draw(tmp_path / "a.png", blue_map([[0.5, 0.5]] * 2)), draw(tmp_path / "b.png", large)
    assert tall.shape[0] > small.shape[0]
    assert tall.shape[1] > small.shape[1]


def test_a_worse_model_is_the_higher_curve_and_each_has_a_name(tmp_path):
    ranges = [(1, 64), (65, 128)]
    curves = [PositionCurve("dense", ranges, [4.0, 3.0]), PositionCurve("sparse", ranges, [9.0, 9.5])]
    save_by_position(curves, "a text", tmp_path / "positions.png")
    image = imread(tmp_path / "positions.png")[..., :3]
    tab_blue, tab_orange = np.array([31, 119, 180]) / 255, np.array([255, 127, 14]) / 255
    is_drawn = [(abs(image - color) < 0.02).all(-1).sum(1) > 100 for color in (tab_blue, tab_orange)]
    rows = [np.nonzero(drawn)[0] for drawn in is_drawn]
    assert rows[1].max() < rows[0].min()  # rows are counted from the top


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"--png .*missing/map.png: cannot be written \(No such file"):
        draw(tmp_path / "missing" / "map.png", blue_map([[0.5, 0.5]] * 2))
    with pytest.raises(ConfigError, match=r"--png .*missing/p.png: cannot be written \(No such file"):
        save_by_position([PositionCurve("a", [(1, 2)], [3.0])], "t", tmp_path / "missing" / "p.png")
