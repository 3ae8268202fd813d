"""Grids: every image in its place, none cut off, tiny ones made visible."""

import numpy as np
import pytest
from PIL import Image

from fpdm.imaging import grid


def flat(value, side, mode="L"):
    return Image.new(mode, (side, side), value)


@pytest.mark.parametrize(
    ("count", "columns", "size"),
    [(1, 5, (36, 36)), (5, 5, (172, 36)), (6, 5, (172, 70)), (10, 5, (172, 70)), (3, 1, (36, 104))],
)
def test_the_size_of_a_grid(count, columns, size):
    assert grid([flat(0, 32)] * count, columns, gap=2).size == size


@pytest.mark.parametrize(("side", "drawn"), [(8, 32), (20, 40), (31, 62), (32, 32), (64, 64)])
def test_tiny_images_are_enlarged_by_a_whole_number(side, drawn):
    assert grid([flat(0, side)], 1, least=32, gap=0).size == (drawn, drawn)


def test_images_stand_in_reading_order_on_white():
    values = [10, 20, 30, 40, 50]
    picture = np.asarray(grid([flat(value, 4) for value in values], columns=3, least=4, gap=1))
    cells = [
        picture[1 + 5 * row : 5 + 5 * row, 1 + 5 * column : 5 + 5 * column] for row in range(2) for column in range(3)
    ]
    assert [set(cell.flat) for cell in cells] == [{10}, {20}, {30}, {40}, {50}, {255}]
    assert (picture[::5] == 255).all()
    assert (picture[:, ::5] == 255).all()


def test_a_missing_image_leaves_its_place_white():
    there = [flat(value, 4) for value in (10, 20, 30)]
    picture = np.asarray(grid([None, there[0], None, there[1], there[2], None], columns=3, least=4, gap=0))
    assert [set(cell.flat) for row in np.split(picture, 2) for cell in np.split(row, 3, axis=1)] == [
        {255}, {10}, {255},
        {20}, {30}, {255},
    ]  # fmt: skip


@pytest.mark.parametrize("images", [[], [None, None]])
def test_nothing_makes_no_grid(images):
    with pytest.raises(ValueError, match="no images"):
        grid(images, 3)


def test_pixels_are_not_blurred():
    pattern = np.array([[0, 255], [90, 10]], np.uint8)
    picture = grid([Image.fromarray(pattern)], 1, least=6, gap=0)
    assert np.array_equal(np.asarray(picture), pattern.repeat(3, 0).repeat(3, 1))


def test_colour_stays():
    picture = grid([flat((255, 0, 0), 4, "RGB")], 1, least=4, gap=1)
    assert picture.mode == "RGB"
    assert picture.getpixel((1, 1)) == (255, 0, 0)
    assert picture.getpixel((0, 0)) == (255, 255, 255)
