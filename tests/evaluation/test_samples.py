"""Sets of samples: what is in them, which classes they were asked for, and what is refused, naming the file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fpdm.data import write_npz
from fpdm.evaluation import open_samples
from fpdm.evaluation.samples import LEAST, Samples

RNG = np.random.default_rng(0)
COUNT = LEAST + 10
GREY = RNG.integers(0, 256, (COUNT, 6, 6), np.uint8)
COLOURED = RNG.integers(0, 256, (COUNT, 6, 6, 3), np.uint8)


def drawn(folder, images=GREY, **request):
    """A folder as drawing leaves it."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.png")
    (folder / "request.json").write_text(json.dumps({"classes": None, "class_names": [], **request}))
    Image.new("L", (90, 30)).save(folder / "grid.png")
    return folder


def album(folder, images=GREY, name="{:03d}.png"):
    """A folder of images of another program."""
    for i, image in enumerate(images):
        path = folder / name.format(i, i % 3)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def all_of(samples, channels=1):
    return torch.cat(list(samples.batches(channels, 16))).numpy()


# What is in them


def test_a_folder_that_was_drawn(tmp_path):
    samples = open_samples(drawn(tmp_path, classes=[3, 5, 6], class_names=list("abcdefghij")))
    assert (len(samples), samples.size) == (COUNT, 6)
    assert np.array_equal(all_of(samples)[:, 0], GREY)
    assert samples.labels(list("abcdefghij")) == [(3, 5, 6)[i % 3] for i in range(COUNT)]


def test_only_so_many_of_a_folder_that_was_drawn(tmp_path):
    samples = open_samples(drawn(tmp_path, classes=[1, 0], class_names=["a", "b"]), LEAST)
    assert np.array_equal(all_of(samples)[:, 0], GREY[:LEAST])
    assert samples.labels(["a", "b"]) == [1, 0] * (LEAST // 2)


def test_samples_are_grey_however_they_are_stored(tmp_path):
    as_rgb = np.repeat(GREY[..., None], 3, axis=3)
    one_coloured = np.concatenate([as_rgb[:-1], COLOURED[:1]])
    places = {1: (GREY, as_rgb), 3: (COLOURED, one_coloured)}
    for channels, sets in places.items():
        for i, images in enumerate(sets):
            assert open_samples(album(tmp_path / f"{channels}-{i}", images)).channels == channels


def test_a_lost_image_does_not_shift_the_classes(tmp_path):
    folder = drawn(tmp_path, classes=[0, 1, 2], class_names=["a", "b", "c"])
    (folder / "000001.png").unlink()
    samples = open_samples(folder)
    assert len(samples) == COUNT - 1
    assert samples.labels(["a", "b", "c"]) == [i % 3 for i in range(COUNT) if i != 1]


def test_classes_without_names_are_numbers(tmp_path):
    samples = open_samples(drawn(tmp_path, classes=[4, 1], class_names=[]))
    assert samples.labels(list("abcde")) == [4, 1] * (COUNT // 2)


def test_classes_that_were_asked_for_by_name(tmp_path):
    samples = open_samples(drawn(tmp_path, classes=[2, 0], class_names=["ant", "cat", "dog"]))
    assert samples.labels(["ant", "cat", "dog"]) == [2, 0] * (COUNT // 2)


@pytest.mark.parametrize(("data", "labels"), [("01", [1, 0]), ("012", None), ("02", None), ("ab", None)])
def test_names_of_a_model_are_numbers_where_the_data_has_only_as_many_of_these(tmp_path, data, labels):
    samples = open_samples(drawn(tmp_path, classes=[1, 0], class_names=["trouser", "shirt"]))
    assert samples.labels(list(data)) == (labels and labels * (COUNT // 2))


def test_names_of_a_model_that_are_numbers_are_not_taken_for_others(tmp_path):
    samples = open_samples(drawn(tmp_path, classes=[1, 0], class_names=["1", "2"]))
    assert samples.labels(["0", "1"]) is None


def test_drawn_without_classes(tmp_path):
    samples = open_samples(drawn(tmp_path))
    assert samples.labels(["a", "b"]) is None
    assert np.array_equal(all_of(samples)[:, 0], GREY)


def test_a_folder_per_class(tmp_path):
    samples = open_samples(album(tmp_path, name="{1}/{0:03d}.png"))
    labels = [c for c in range(3) for _ in range(COUNT // 3)]
    assert samples.labels(["0", "1", "2", "3"]) == labels
    assert np.array_equal(all_of(samples)[:, 0], np.concatenate([GREY[c::3] for c in range(3)]))


@pytest.mark.parametrize("images", [GREY, COLOURED], ids=["grey", "coloured"])
def test_a_flat_folder(tmp_path, images):
    samples = open_samples(album(tmp_path, images))
    assert samples.labels(["a", "b"]) is None
    expected = np.broadcast_to(images.reshape(COUNT, 6, 6, -1), (COUNT, 6, 6, 3)).transpose(0, 3, 1, 2)
    assert np.array_equal(all_of(samples, 3), expected)


def test_an_npz_file(tmp_path):
    write_npz(tmp_path / "a.npz", COLOURED, COUNT, np.arange(COUNT) % 4)
    samples = open_samples(tmp_path / "a.npz")
    assert (len(samples), samples.size) == (COUNT, 6)
    assert np.array_equal(all_of(samples, 3), COLOURED.transpose(0, 3, 1, 2))
    assert samples.labels(list("0123456789")) == [i % 4 for i in range(COUNT)]
    write_npz(tmp_path / "b.npz", COLOURED, COUNT)
    assert open_samples(str(tmp_path / "b.npz")).labels(["0"]) is None


def test_batches_are_in_order_and_the_last_is_what_is_left(tmp_path):
    samples = open_samples(album(tmp_path))
    assert [len(batch) for batch in samples.batches(1, 16)] == [16, 16, 16, COUNT - 48]
    for batch in samples.batches(3, COUNT):
        assert (batch.shape, batch.dtype) == ((COUNT, 3, 6, 6), torch.uint8)


# Classes of the samples, as classes of the data


class Labelled:
    labels = [0, 1, 0]

    def __init__(self, *names):
        self.class_names = list(names)


@pytest.mark.parametrize(
    ("names", "data", "labels"),
    [
        (["b", "a"], ["a", "b", "c"], [1, 0, 1]),  # by name, in whatever order
        (["0", "1"], ["1", "0"], [1, 0, 1]),
        (["0", "1"], ["cat", "dog", "eel"], [0, 1, 0]),  # by number
        (["0", "1"], ["0"], None),
        (["a", "z"], ["a", "b", "c"], None),
        ([], ["a"], None),
        (["a"], [], None),
    ],
)
def test_classes_are_found_by_name_else_by_number(names, data, labels):
    assert Samples(Labelled(*names), 8).labels(data) == labels


def test_a_folder_per_class_by_number_where_there_are_more_than_ten(tmp_path):
    """Sorted, they are 0, 1, 10, 11, 2, ..."""
    folder = tmp_path
    for i in range(60):
        path = folder / str(i % 12) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(GREY[i]).save(path)
    labels = open_samples(folder).labels([f"class {c}" for c in range(12)])
    assert labels == [c for c in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9) for _ in range(5)]


# Grey and coloured


def rgb(images):
    return np.repeat(images[..., None], 3, axis=3)


def test_grey_samples_saved_as_rgb_are_grey(tmp_path):
    for samples in (open_samples(album(tmp_path / "a", rgb(GREY))), open_samples(drawn(tmp_path / "b", rgb(GREY)))):
        assert np.array_equal(all_of(samples)[:, 0], GREY)


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_drawn_samples_that_a_tool_packed_otherwise_keep_their_colours(tmp_path, mode):
    samples = COLOURED.copy()
    samples[:, 3:] = samples[:, :3]  # few enough colours for a palette
    folder = drawn(tmp_path, samples)
    for path in folder.glob("0*.png"):
        with Image.open(path) as image:
            packed = image.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)
        packed.save(path)
    seen = [np.asarray(Image.open(folder / f"{i:06d}.png").convert("RGB")).transpose(2, 0, 1) for i in range(COUNT)]
    assert np.array_equal(all_of(open_samples(folder), 3), np.stack(seen))


def test_grey_samples_have_equal_channels_where_the_data_is_coloured(tmp_path):
    write_npz(tmp_path / "a.npz", GREY, COUNT)
    for samples in (open_samples(tmp_path / "a.npz"), open_samples(drawn(tmp_path / "b"))):
        assert np.array_equal(all_of(samples, 3), rgb(GREY).transpose(0, 3, 1, 2))


def test_coloured_samples_are_refused_where_the_data_is_grey(tmp_path):
    images = rgb(GREY)
    images[17, 2, 3, 1] ^= 1
    samples = open_samples(album(tmp_path, images))
    with pytest.raises(ValueError, match=r"in colour \(number 17 is\).*grey"):
        all_of(samples)


# What is refused


def other(images, number, change):
    return [change(image) if i == number else image for i, image in enumerate(images)]


def as_npz(folder, images):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "a.npz", np.stack(images))
    return folder / "a.npz"


PLACES = {
    "drawn": (drawn, "{:06d}.png"),
    "album": (album, "{:03d}.png"),
    "npz": (as_npz, "image {}"),
}


def refusal(place):
    with pytest.raises(ValueError, match=r".") as error:
        open_samples(place)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_image_is_no_set_of_samples(tmp_path):
    Image.fromarray(GREY[0]).save(tmp_path / "one.png")
    assert "one.png is one image: name a folder of images" in refusal(tmp_path / "one.png")


@pytest.mark.parametrize("kind", PLACES)
def test_too_few_are_refused(tmp_path, kind):
    make, _ = PLACES[kind]
    place = make(tmp_path / "samples", GREY[: LEAST - 1])
    said = refusal(place)
    assert all(word in said for word in [str(place), f"{LEAST - 1} images", f"{LEAST} or more"])
    assert len(open_samples(make(tmp_path / "more", GREY[:LEAST]))) == LEAST


@pytest.mark.parametrize("kind", ["drawn", "album"])
@pytest.mark.parametrize("raw", [b"", b"no image"])
def test_a_broken_sample_is_named(tmp_path, kind, raw):
    make, name = PLACES[kind]
    place = make(tmp_path, GREY)
    (place / name.format(23)).write_bytes(raw)
    said = refusal(place)
    assert all(word in said for word in [str(place), name.format(23), "cannot be read"])


@pytest.mark.parametrize("kind", ["drawn", "album"])
def test_a_truncated_sample_is_named(tmp_path, kind):
    make, name = PLACES[kind]
    place = make(tmp_path, RNG.integers(0, 256, (LEAST, 40, 40), np.uint8))
    path = place / name.format(23)
    path.write_bytes(path.read_bytes()[:500])
    assert name.format(23) in refusal(place)


@pytest.mark.parametrize("kind", ["drawn", "album"])
def test_a_sample_of_another_size_is_named(tmp_path, kind):
    make, name = PLACES[kind]
    said = refusal(make(tmp_path, other(GREY, 31, lambda image: image[:4, :4])))
    assert all(word in said for word in [str(tmp_path), name.format(31), "4 x 4", "6 x 6"])


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(("part", "size"), [(np.s_[:, :4], "4 x 6"), (np.s_[:4], "6 x 4")])
def test_samples_that_are_not_square_are_refused(tmp_path, kind, part, size):
    make, name = PLACES[kind]
    said = refusal(make(tmp_path, [image[part] for image in GREY]))
    assert all(word in said for word in [name.format(0), f"is {size}, not square"])


def test_one_sample_that_is_not_square_is_named(tmp_path):
    said = refusal(album(tmp_path, other(GREY, 5, lambda image: image[:4])))
    assert all(word in said for word in ["005.png", "6 x 4", "not square"])


@pytest.mark.parametrize("place", ["nowhere", "nowhere.npz"])
def test_samples_that_are_not_there(tmp_path, place):
    assert "there are no samples" in refusal(tmp_path / place)


def test_a_folder_without_samples(tmp_path):
    assert "holds no images" in refusal(tmp_path)
    (tmp_path / "request.json").write_text(json.dumps({"classes": None, "class_names": []}))
    assert "holds 0 images" in refusal(tmp_path)


def test_a_file_that_is_no_archive(tmp_path):
    Image.fromarray(GREY[0]).save(tmp_path / "a.png")
    assert "a.png" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("text", ["{", "", "{}", "[]"])
def test_a_damaged_request_is_named(tmp_path, text):
    drawn(tmp_path)
    (tmp_path / "request.json").write_text(text)
    assert "request.json" in refusal(tmp_path)
