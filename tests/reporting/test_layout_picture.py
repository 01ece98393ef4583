"""A layout's picture as text, against pictures drawn by hand."""

import pytest
import torch

from sparse_llama.reporting.layout_picture import Picture, draw, fit_cells, legend

NOT_CAUSAL = float("nan")
SHARES = [
    [1.0, NOT_CAUSAL, NOT_CAUSAL],
    [0.0, 0.9, NOT_CAUSAL],
    [0.5, 0.01, 1.0],
]


def picture(token: int | None = None, shares: list[list[float]] = SHARES, **sides: int) -> Picture:
    cells = {"num_tokens": 48, "row_tokens": 16, "column_tokens": 16} | sides
    return Picture("title", torch.tensor(shares), token=token, **cells)


def test_a_block_is_a_square_of_two_characters_with_a_shade():
    assert draw(picture(), is_ascii=True).splitlines() == [
        "        0",
        "      0 ##",
        "        ..%%",
        "        ++::##",
    ]


def test_cells_of_half_a_square_are_one_character():
    shares = [[1.0, 0.5, NOT_CAUSAL, NOT_CAUSAL], [0.2, 0.0, 1.0, 0.5]]
    drawn = draw(picture(shares=shares, column_tokens=8, num_tokens=32), is_ascii=True)
    assert drawn.splitlines()[1:] == ["      0 #+", "        :.#+"]


def test_the_row_of_a_token_is_marked():
    for column_tokens in (16, 8):
        drawn = draw(picture(token=31, column_tokens=column_tokens), is_ascii=True).splitlines()
        assert [number for number, line in enumerate(drawn[1:]) if ">" in line] == [1]


def test_shades_change_at_thirds():
    shares = [[0.0, 0.01, 0.33, 0.34, 0.66, 0.67, 0.99, 1.0]]
    assert draw(picture(shares=shares, column_tokens=8), is_ascii=True).splitlines()[1][8:] == ".::++%%#"


def test_the_legend_explains_every_shade():
    for is_ascii in (True, False):
        line = draw(picture(shares=[[0.0, 0.3, 0.5, 0.9, 1.0]]), is_ascii=is_ascii).splitlines()[1]
        shades = line[-10::2]
        assert len(set(shades)) == 5
        explained = legend(picture(), is_ascii=is_ascii).split("attend: ")[1].split()
        assert [word for word in explained if word in shades] == list(shades)


def test_axes_number_the_first_token_of_every_fourth_row():
    shares = torch.ones(16, 16).tolist()
    lines = draw(picture(shares=shares, row_tokens=64, column_tokens=64)).splitlines()
    assert lines[0].split() == ["0", "256", "512", "768"]
    assert [line[:7].strip() for line in lines[1:]][::4] == ["0", "256", "512", "768"]
    for number in ("0", "256", "512", "768"):
        assert lines[0].index(number) == 8 + int(number) // 64 * 2


@pytest.mark.parametrize("width", [20, 60, 80, 132, 400])
@pytest.mark.parametrize("num_blocks", [1, 7, 36, 37, 512, 1000, 32768])
def test_a_picture_fits_the_width_and_a_screen(num_blocks: int, width: int):
    rows, columns = fit_cells(num_blocks, width)
    num_rows, num_columns = -(-num_blocks // rows), -(-num_blocks // columns)
    triangle = torch.ones(num_rows, num_columns)
    drawn = draw(picture(shares=triangle.tolist(), row_tokens=16 * rows, column_tokens=16 * columns))
    assert max(map(len, drawn.splitlines()[1:])) <= width
    assert len(drawn.splitlines()) <= 1 + 48


def test_a_wide_terminal_shows_a_long_row_no_coarser_than_it_must():
    assert fit_cells(512, 80) == (16, 8)  # 36 squares of room: 32 are used
    assert fit_cells(36, 80) == (1, 1)
