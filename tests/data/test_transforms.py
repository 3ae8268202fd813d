"""From an image to what a network takes: known patterns come out where they should, and chance has a key."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fpdm.data import CROPS, prepare
from fpdm.data.transforms import resize
from fpdm.keyed import generator


def ramp(width, height, channels=1):
    """Every pixel its own value, rising to the right by 1 and downwards by 7; in channels 2 and 3 shifted."""
    grey = (np.arange(width) + 7 * np.arange(height)[:, None]).astype(np.uint8)
    return Image.fromarray(grey if channels == 1 else np.stack([grey, grey + 1, grey + 2], axis=2))


def pixels(tensor):
    return ((tensor + 1) * 127.5).round().to(torch.uint8)


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)), st.integers(1, 20), st.sampled_from(CROPS), st.booleans(),
    st.sampled_from([1, 3]), st.integers(0, 9),
)  # fmt: skip
def test_any_image_becomes_a_square_in_range(shape, size, crop, flip, channels, key):
    out = prepare(ramp(*shape, channels), size, crop, flip, generator(key))
    assert out.shape == (channels, size, size)
    assert out.dtype == torch.float32
    assert -1 <= out.min() <= out.max() <= 1


def test_black_and_white_are_the_ends_of_the_range():
    for value, expected in ((0, -1.0), (255, 1.0)):
        assert (prepare(Image.new("L", (4, 4), value), 4, "center", False, generator(0)) == expected).all()


@pytest.mark.parametrize(("width", "height", "left", "top"), [(8, 8, 0, 0), (14, 8, 3, 0), (8, 12, 0, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_centre_is_cut_out(width, height, left, top, channels):
    image = ramp(width, height, channels)
    out = pixels(prepare(image, 8, "center", False, generator(0)))
    expected = np.atleast_3d(np.asarray(image))[top : top + 8, left : left + 8].transpose(2, 0, 1)
    assert np.array_equal(out.numpy(), expected)


def test_halving_averages_areas():
    blocks = np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)
    out = prepare(Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)), 8, "center", False, generator(0))
    assert np.array_equal(pixels(out)[0].numpy(), blocks)
    checks = Image.fromarray(np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255)
    out = prepare(checks, 8, "center", False, generator(0))
    assert (out.abs() < 0.02).all()  # grey, where taking every eighth pixel would give black or white


@pytest.mark.parametrize("side", [1, 3, 8, 15, 16, 17, 64, 101])
def test_resizing_is_exact(side):
    assert resize(ramp(side, side), 8).size == (8, 8)


def test_a_long_strip_costs_what_its_square_costs(monkeypatch):
    """Resized before it is cropped, a strip of 3 x 60,000 pixels would become 64 x 1,280,000."""
    real, seen = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *how: seen.append(size) or real(self, size, *how))
    assert prepare(Image.new("L", (60_000, 3)), 64, "center", False, generator(0)).shape == (1, 64, 64)
    assert seen == [(64, 64)]


def test_small_images_are_enlarged():
    out = prepare(Image.new("RGB", (3, 5), (255, 0, 255)), 12, "random", True, generator(0))
    assert out.shape == (3, 12, 12)
    assert (out[0] == 1).all()
    assert (out[1] == -1).all()


def test_flip_mirrors_with_probability_one_half():
    image = ramp(6, 6)
    plain = prepare(image, 6, "center", False, generator(0))
    outcomes = [prepare(image, 6, "center", True, generator(i)) for i in range(400)]
    mirrored = [torch.equal(out, plain.flip(2)) for out in outcomes]
    assert all(m or torch.equal(out, plain) for m, out in zip(mirrored, outcomes, strict=True))
    assert abs(sum(mirrored) - 200) < 4 * 10  # standard deviations of 10


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("crop", CROPS)
def test_chance_is_the_generators(crop, flip):
    image = ramp(20, 30)
    first, second = (prepare(image, 8, crop, flip, generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    generators = generator(3), generator(3)
    prepare(image, 8, crop, flip, generators[0])
    prepare(image, 8, "center", False, generators[1])
    assert torch.equal(*(g.get_state() for g in generators))  # the same numbers are drawn whatever the settings


def test_random_crops_stay_inside_and_go_everywhere():
    # Left and top of each crop, read off a ramp that only changes along one axis: no resizing can hide them.
    for axis in (1, 2):
        image = np.arange(0, 200, 2, dtype=np.uint8)[:, None].repeat(100, 1)
        image = Image.fromarray(image if axis == 1 else image.T.copy())
        corners = []
        for i in range(300):
            values = pixels(prepare(image, 50, "random", False, generator(i)))[0].float().movedim(axis - 1, 0)[:, 0]
            assert (values.diff() > 0).all()  # a crop that left the image would be black there
            corners.append((values[0].item(), values[-1].item()))
        starts, ends = zip(*corners, strict=True)
        assert min(starts) < 4
        assert max(ends) > 194
        spans = np.subtract(ends, starts) / 196  # the share of the image that is seen
        assert 0.76 < spans.min() < 0.85
        assert spans.max() > 0.95


def test_the_centre_crop_ignores_chance():
    image = ramp(20, 30)
    outcomes = [prepare(image, 8, "center", False, generator(i)) for i in range(5)]
    assert all(torch.equal(out, outcomes[0]) for out in outcomes)
