"""Images in one file, what a word on the command line means, and the way from an image to pixels and back."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fpdm.data import ArraySource, ImageFolder, central, digits, image_of, npz_file, open_images, pixels, prepare
from fpdm.data import write_npz as write
from fpdm.keyed import generator
from tests.pickles import HAPPENED, Ran

RNG = np.random.default_rng(0)
COLOURED = RNG.integers(0, 256, (5, 4, 6, 3), np.uint8)
GREY = COLOURED[..., 0]
LABELS = np.array([2, 0, 1, 2, 2])


# .npz files


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path / "a.npz", iter(COLOURED), 5, LABELS.astype(np.uint8))
    source = npz_file(tmp_path / "a.npz")
    assert np.array_equal(source.images, COLOURED)
    assert np.array_equal(source.labels, LABELS)
    assert (source.channels, source.class_names, len(source)) == (3, ["0", "1", "2"], 5)
    image, label = source.load(3)
    assert (image.mode, image.size, label) == ("RGB", (6, 4), 2)
    assert np.array_equal(np.asarray(image), COLOURED[3])


def test_numpy_reads_what_is_written(tmp_path):
    write(tmp_path / "a.npz", COLOURED, 5, LABELS.astype(np.uint8))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert (archive["arr_0"].dtype, archive["arr_0"].shape) == (np.uint8, (5, 4, 6, 3))
        assert (archive["arr_1"].dtype, archive["arr_1"].shape) == (np.int64, (5,))
        assert np.array_equal(archive["arr_0"], COLOURED)
        assert np.array_equal(archive["arr_1"], LABELS)


def test_without_labels_there_are_no_classes(tmp_path):
    write(tmp_path / "a.npz", COLOURED, 5)
    with np.load(tmp_path / "a.npz") as archive:
        assert archive.files == ["arr_0"]
    source = npz_file(tmp_path / "a.npz")
    assert source.class_names == []
    assert source.load(4)[1] == 0


@pytest.mark.parametrize("images", [GREY, GREY[..., None]], ids=["NHW", "NHW1"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_grey_images(tmp_path, images, save):
    save(tmp_path / "a.npz", images, LABELS)
    source = npz_file(tmp_path / "a.npz")
    assert (source.channels, len(source)) == (1, 5)
    image, label = source.load(0)
    assert (image.mode, image.size, label) == ("L", (6, 4), 2)
    assert np.array_equal(np.asarray(image), GREY[0])


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"images": COLOURED, "labels": LABELS}, "no arr_0; found: images, labels"),
        ({}, "no arr_0; found: nothing"),
        ({"arr_0": COLOURED.astype(np.float32)}, r"arr_0 is float32 \(5, 4, 6, 3\); it must be uint8"),
        ({"arr_0": COLOURED.astype(np.int64)}, "arr_0 is int64"),
        ({"arr_0": COLOURED.transpose(0, 3, 1, 2)}, r"arr_0 is uint8 \(5, 3, 4, 6\)"),
        ({"arr_0": COLOURED[..., :2]}, r"arr_0 is uint8 \(5, 4, 6, 2\)"),
        ({"arr_0": GREY[0]}, r"arr_0 is uint8 \(4, 6\)"),
        ({"arr_0": COLOURED[None]}, r"arr_0 is uint8 \(1, 5, 4, 6, 3\)"),
        ({"arr_0": COLOURED, "arr_1": LABELS[:4]}, r"arr_1 is int64 \(4,\), not a label for each of 5 images"),
        ({"arr_0": COLOURED, "arr_1": np.eye(5, dtype=np.int64)}, r"arr_1 is int64 \(5, 5\)"),
        ({"arr_0": COLOURED, "arr_1": LABELS / 2}, "arr_1 is float64"),
        ({"arr_0": COLOURED, "arr_1": LABELS - 1}, "labels from -1"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path, arrays, text):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=text) as refusal:
        npz_file(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(refusal.value)


def test_unpickling_is_noticed():
    pickle.loads(pickle.dumps(Ran()))
    assert HAPPENED.pop() == "ran"


def whole(path):
    write(path, COLOURED, 5, LABELS)
    return path.read_bytes()


def cut(path):
    path.write_bytes(whole(path)[:300])


def end_cut_off(path):
    path.write_bytes(whole(path)[:-1])


def other_pixels(path):
    raw = bytearray(whole(path))
    raw[200] ^= 1  # what the archive's check sum is for
    path.write_bytes(raw)


def objects(path):
    np.savez(path, np.array([Ran()], object))


def pickled(path):
    path.write_bytes(pickle.dumps(Ran()))


def one_array(path):
    with path.open("wb") as file:
        np.save(file, COLOURED)


def no_arrays(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0", "hello")


def a_photograph(path):
    with path.open("wb") as file:
        Image.fromarray(COLOURED[0]).save(file, format="PNG")


@pytest.mark.parametrize(
    "spoil",
    [
        cut,
        end_cut_off,
        other_pixels,
        objects,
        pickled,
        one_array,
        no_arrays,
        a_photograph,
        lambda path: path.write_text("no archive"),
        lambda path: path.write_bytes(b""),
    ],
)
def test_damaged_files_are_refused_by_name_and_nothing_is_unpickled(tmp_path, spoil):
    spoil(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz"):
        npz_file(tmp_path / "a.npz")
    assert HAPPENED == []


def refusal_of(path):
    try:
        npz_file(path)
    except Exception as error:
        return error
    return None


def test_whatever_byte_is_damaged_the_file_is_read_or_refused_by_name(tmp_path):
    path, others = tmp_path / "a.npz", {}
    raw = whole(path)
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        refusal = refusal_of(path)
        if refusal is not None and not (isinstance(refusal, ValueError) and str(path) in str(refusal)):
            others[place] = repr(refusal)
    assert others == {}


def test_the_fingerprint_of_a_file_is_of_its_images_and_labels(tmp_path):
    def of(images, labels=None, save=np.savez, name="a.npz"):
        save(tmp_path / name, images, *([] if labels is None else [labels]))
        return npz_file(tmp_path / name).fingerprint

    fingerprint = of(COLOURED, LABELS)
    assert of(COLOURED, LABELS, np.savez_compressed, "b.npz") == fingerprint
    write(tmp_path / "c.npz", COLOURED, 5, LABELS)
    assert npz_file(tmp_path / "c.npz").fingerprint == fingerprint
    assert of(GREY, LABELS) == of(GREY[..., None], LABELS)
    brighter = COLOURED.copy()
    brighter[4, 3, 5, 2] ^= 1
    others = [
        of(brighter, LABELS),
        of(COLOURED[::-1], LABELS),
        of(COLOURED, LABELS[::-1]),
        of(COLOURED),
        of(GREY, LABELS),
    ]
    assert len({fingerprint, *others}) == 6


# What a word on the command line means


def write_idx(folder, count, split):
    folder.mkdir(exist_ok=True)
    images, labels = RNG.integers(0, 256, (count, 4, 4), np.uint8), np.arange(count, dtype=np.uint8) % 3
    for name, array in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / name).write_bytes(header + array.tobytes())
    return images


def test_the_digits_are_a_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_images("digits").fingerprint == digits().fingerprint


def test_an_npz_file(tmp_path):
    write(tmp_path / "a.npz", COLOURED, 5, LABELS)
    source = open_images(str(tmp_path / "a.npz"))
    assert isinstance(source, ArraySource)
    assert np.array_equal(source.images, COLOURED)


def test_a_file_without_images_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", COLOURED[:0], LABELS[:0])
    with pytest.raises(ValueError, match=r"a\.npz"):
        open_images(str(tmp_path / "a.npz"))


def test_a_folder_of_idx_files_has_two_splits(tmp_path):
    shown, kept_back = write_idx(tmp_path, 7, "train"), write_idx(tmp_path, 4, "t10k")
    train, test = open_images(str(tmp_path)), open_images(str(tmp_path), split="test")
    assert np.array_equal(train.images, shown)
    assert np.array_equal(test.images, kept_back)
    assert train.class_names == test.class_names == ["0", "1", "2"]
    assert train.fingerprint != test.fingerprint


def test_a_split_that_is_not_there_is_named(tmp_path):
    write_idx(tmp_path, 7, "train")
    with pytest.raises(ValueError, match="no t10k-images-idx3-ubyte"):
        open_images(str(tmp_path), split="test")


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_a_folder_of_images(tmp_path, channels, mode):
    Image.fromarray(COLOURED[0]).save(tmp_path / "a.png")
    source = open_images(str(tmp_path), channels)
    assert isinstance(source, ImageFolder)
    assert (source.channels, source.load(0)[0].mode) == (channels, mode)


@pytest.mark.parametrize("place", ["nowhere", "nowhere.npz", "digit", "a.png"])
def test_a_place_that_is_not_there(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(COLOURED[0]).save("a.png")
    with pytest.raises(ValueError, match=f"{place}.*folder of images.*npz.*digits"):
        open_images(place)


@pytest.mark.parametrize(("split", "near"), [("tets", "'test'"), ("training", "'train'"), ("val", "train, test")])
def test_an_unknown_split_names_the_nearest(split, near):
    with pytest.raises(ValueError, match=near) as refusal:
        open_images("digits", split=split)
    assert repr(split) in str(refusal.value)


def test_only_idx_files_have_a_test_split(tmp_path):
    write(tmp_path / "a.npz", COLOURED, 5)
    (tmp_path / "images").mkdir()
    Image.fromarray(COLOURED[0]).save(tmp_path / "images/a.png")
    for place in ("digits", str(tmp_path / "a.npz"), str(tmp_path / "images")):
        with pytest.raises(ValueError, match="only folders of IDX files have") as refusal:
            open_images(place, split="test")
        assert place in str(refusal.value)


# To pixels and back

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]))


def noise(width, height, channels, seed):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(array[..., 0] if channels == 1 else array)


@given(shapes, st.integers(1, 20), st.integers(0, 9))
def test_central_is_what_training_sees_but_for_its_scale(shape, size, seed):
    image = noise(*shape, seed)
    seen = prepare(image, size, "center", False, generator(seed))
    assert torch.equal(pixels(central(image, size)).float() / 127.5 - 1, seen)


@given(shapes, st.integers(0, 9))
def test_pixels_and_image_of_undo_each_other(shape, seed):
    image = noise(*shape, seed)
    tensor = pixels(image)
    width, height, channels = shape
    assert (tensor.shape, tensor.dtype) == ((channels, height, width), torch.uint8)
    back = image_of(tensor)
    assert (back.mode, back.size) == (image.mode, image.size)
    assert back.tobytes() == image.tobytes()
    assert torch.equal(pixels(back), tensor)
    assert torch.equal(pixels(image, mirrored=True), tensor.flip(2))


def test_pixels_may_be_written_to():
    image = noise(4, 4, 3, 0)
    before = image.tobytes()
    pixels(image).zero_()
    assert image.tobytes() == before
