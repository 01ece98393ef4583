"""The PNG of a layout: its pixels, panel for panel."""

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from sparse_llama.errors import ConfigError
from sparse_llama.reporting.layout_picture import Picture
from sparse_llama.reporting.layout_png import save_layouts


def triangle(fill: float) -> Picture:
    shares = torch.full((8, 8), fill).tril()
    shares[torch.ones(8, 8).triu(1).bool()] = float("nan")
    return Picture(f"{fill}", shares, 128, 16, 16)


def dark_share(file: Path) -> float:
    """Return the share of pixels as dark as full attention is drawn."""
    pixels = imread(file)[..., :3]
    return float((pixels.max(axis=-1) < 0.35).mean())


def test_full_attention_is_drawn_dark_and_none_is_not(tmp_path: Path):
    shares = {}
    for fill in (0.0, 1.0):
        save_layouts([triangle(fill)], tmp_path / "one.png")
        shares[fill] = dark_share(tmp_path / "one.png")
    assert shares[1.0] > shares[0.0] + 0.15  # half of a panel that fills most of the picture


def test_every_picture_gets_a_panel(tmp_path: Path):
    """Five panels are a row of four and one more: the picture grows to twice the height of one row."""
    sizes = {}
    for count in (1, 4, 5):
        save_layouts([triangle(1.0)] * count, tmp_path / "some.png")
        sizes[count] = imread(tmp_path / "some.png").shape[:2]
    assert sizes[4][0] == sizes[1][0]
    assert sizes[4][1] > 3 * sizes[1][1]
    assert sizes[5][0] > 1.8 * sizes[4][0]
    assert sizes[5][1] == sizes[4][1]


def test_a_file_that_cannot_be_written_is_the_users_mistake(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--png .*: cannot be written \(No such file or directory\)"):
        save_layouts([triangle(1.0)], tmp_path / "missing" / "one.png")
