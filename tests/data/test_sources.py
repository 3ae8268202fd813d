"""Sources: what is in them, what they read, and what they refuse."""

import errno
import gzip
import os
import random
import shutil
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from fpdm.data import ArraySource, BrokenImage, ImageFolder, digits, idx_folder, read_image
from fpdm.data.arrays import read_idx
from fpdm.data.transforms import central

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


# Digits


def test_the_digits():
    source = digits()
    assert len(source) == 1797
    assert source.images.shape == (1797, 8, 8)
    assert source.images.dtype == np.uint8
    assert source.class_names == list("0123456789")
    assert set(source.labels) == set(range(10))
    assert (source.images.min(), source.images.max()) == (0, 255)
    image, label = source.load(1796)
    assert (image.mode, image.size, label) == ("L", (8, 8), 8)


def test_the_digits_are_scikit_learns():
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    source = digits()
    assert np.array_equal(source.labels, theirs.target)
    assert np.array_equal(np.round(source.images * (16 / 255)), theirs.images)


def test_the_digits_say_where_they_come_from():
    with np.load(files("fpdm.data") / "digits.npz", allow_pickle=False) as data:
        assert "UCI" in str(data["source"])
        assert "CC BY 4.0" in str(data["licence"])


def test_an_arrays_fingerprint_is_of_images_and_labels():
    images, labels = np.arange(8, dtype=np.uint8).reshape(2, 2, 2), np.array([0, 1])
    fingerprint = ArraySource(images, labels, ["a", "b"]).fingerprint
    assert fingerprint == ArraySource(images.copy(), labels.copy(), ["a", "b"]).fingerprint
    others = [(images[::-1], labels), (images, labels[::-1]), (images.reshape(2, 4, 1), labels)]
    assert fingerprint not in {ArraySource(*other, ["a", "b"]).fingerprint for other in others}


# IDX files


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


IMAGES = np.arange(5 * 3 * 4, dtype=np.uint8).reshape(5, 3, 4)
LABELS = np.array([0, 2, 1, 2, 0], np.uint8)


def write_idx(folder, images=IMAGES, labels=LABELS, suffix=""):
    pack = gzip.compress if suffix else bytes
    (folder / f"train-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
    (folder / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    write_idx(tmp_path, suffix=suffix)
    source = idx_folder(tmp_path)
    assert source.class_names == ["0", "1", "2"]
    assert np.array_equal(source.images, IMAGES)
    image, label = source.load(3)
    assert np.array_equal(np.asarray(image), IMAGES[3])
    assert (label, source.channels, len(source)) == (2, 1, 5)


WHOLE = idx(IMAGES)


@pytest.mark.parametrize(
    ("name", "raw", "text"),
    [
        ("a", WHOLE[:-1], r"truncated: 59 bytes for shape \(5, 3, 4\)"),
        ("a", WHOLE + b"\0", "truncated: 61 bytes"),
        ("a", WHOLE[:9], "truncated"),
        ("a", idx(IMAGES[:0]), "truncated: 0 bytes"),
        ("a", b"", "not an IDX file"),
        ("a", b"\0\0", "not an IDX file"),
        ("a", b"\x89PNG" + WHOLE, "begins with 89504e47"),
        ("a", b"\0\0\x0d" + WHOLE[3:], "not an IDX file of bytes"),  # floats
        ("a", gzip.compress(WHOLE, mtime=0), "not an IDX file"),  # packed, but not named so
        ("a.gz", gzip.compress(WHOLE, mtime=0)[:-9], "damaged"),
        ("a.gz", WHOLE, "damaged"),
        ("a.gz", gzip.compress(WHOLE, mtime=0)[:20] + b"\xff" * 40, "damaged"),
        ("a.gz", b"", "not an IDX file"),
    ],
)
def test_damaged_idx_files_are_refused_by_name(tmp_path, name, raw, text):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=text) as refusal:
        read_idx(tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value)


def test_idx_folders_that_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        idx_folder(tmp_path / "nowhere")
    (tmp_path / "readme.txt").touch()
    with pytest.raises(ValueError, match=r"no train-images-idx3-ubyte .* found: \['readme.txt'\]"):
        idx_folder(tmp_path)
    write_idx(tmp_path, labels=LABELS[:4])
    with pytest.raises(ValueError, match="do not go together"):
        idx_folder(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="no train-labels-idx1-ubyte"):
        idx_folder(tmp_path)


def test_fashion_mnist():
    folder = SHARED / "fashion-mnist"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    source = idx_folder(folder)
    assert source.images.shape == (60000, 28, 28)
    assert np.array_equal(np.bincount(source.labels), np.full(10, 6000))
    assert len(source.class_names) == 10


# Folders of images


def write(root, *names, colour=(10, 200, 30), mode="RGB"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), colour).convert(mode).save(path)


def test_a_folder_per_class(tmp_path):
    write(tmp_path, "dog/2.png", "dog/1.jpg", "cat/deep/er/x.PNG", "ant/a.bmp")
    source = ImageFolder(tmp_path)
    assert source.class_names == ["ant", "cat", "dog"]
    assert source.names == ["ant/a.bmp", "cat/deep/er/x.PNG", "dog/1.jpg", "dog/2.png"]
    assert [source.load(i)[1] for i in range(len(source))] == [0, 1, 2, 2]


def test_the_order_is_that_of_the_names_not_of_the_disk(tmp_path):
    names = [f"{i * 7 % 30:02}.png" for i in range(30)]
    write(tmp_path, *names)
    assert ImageFolder(tmp_path).names == sorted(names) != names


def test_a_folder_without_classes(tmp_path):
    write(tmp_path, "b.png", "a.webp")
    source = ImageFolder(tmp_path)
    assert (source.class_names, source.names) == ([], ["a.webp", "b.png"])
    assert source.load(0)[1] == 0


def test_hidden_files_and_other_files_are_left_out(tmp_path):
    write(tmp_path, "a/1.png", "a/.2.png", ".thumbs/3.png", "a/.cache/4.png")
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "readme.md").touch()
    assert ImageFolder(tmp_path).names == ["a/1.png"]


@pytest.mark.parametrize("name", ["jfif", "jpe", "JPEG", "jp2", "ppm", "pgm", "qoi", "avif", "tif"])
def test_every_still_image_that_pillow_opens_is_found(name, tmp_path):
    if not features.check({"jp2": "jpg_2000", "avif": "avif"}.get(name, "pil")):
        pytest.skip(f"this Pillow opens no .{name}")
    write(tmp_path, "a/1.png", f"b/1.{name}", mode="L" if name == "pgm" else "RGB")
    source = ImageFolder(tmp_path)
    assert source.class_names == ["a", "b"]
    assert source.load(1)[0].size == (4, 4)


def test_documents_films_and_numbers_are_no_images(tmp_path):
    write(tmp_path, "a.png")
    for end in ("pdf", "eps", "psd", "mpg", "h5", "apng", "avifs", "pfm", "ico", "txt"):
        (tmp_path / f"b.{end}").touch()
    (tmp_path / "c.pdf").touch()
    with pytest.warns(UserWarning, match="has 1 images, and 2 files '.pdf' taken for none"):
        assert ImageFolder(tmp_path).names == ["a.png"]


def test_a_caption_beside_each_image_is_usual(tmp_path):
    write(tmp_path, "a.png", "b.png")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    assert ImageFolder(tmp_path).names == ["a.png", "b.png"]  # warnings are errors here


def test_a_class_of_other_files_does_not_vanish_without_a_word(tmp_path):
    write(tmp_path, "ant/1.png", "bee/1.png")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").touch()
    assert ImageFolder(tmp_path).class_names == ["ant", "bee"]  # warnings are errors here
    (tmp_path / "empty").mkdir()
    (tmp_path / "same").symlink_to(tmp_path / "ant")
    with pytest.warns(UserWarning, match="no classes: empty, same"):
        assert ImageFolder(tmp_path).class_names == ["ant", "bee"]
    (tmp_path / "empty").rmdir()
    (tmp_path / "same").unlink()
    (tmp_path / "cat/deep").mkdir(parents=True)
    (tmp_path / "cat/deep/1.heic").touch()
    with pytest.warns(UserWarning, match=r"folders without images, which are no classes: cat\. .*\.png.*: convert"):
        assert ImageFolder(tmp_path).class_names == ["ant", "bee"]


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    write(tmp_path, "ant/1.png", "bee/1.png")
    scandir = os.scandir

    def denied(path):
        if Path(path).name == "bee":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)  # root may read all
    with pytest.raises(ValueError, match=r"the folder .*bee cannot be read \(Permission denied\)"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("most", [1023, 65535])
def test_grey_maps_of_more_than_eight_bits_are_scaled(most, tmp_path):
    numbers = (np.linspace(0, most, 16).round().astype(">u2")).tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P5 4 4 %d\n" % most + numbers)
    image, _ = ImageFolder(tmp_path, channels=1).load(0)
    assert np.abs(np.asarray(image).ravel() - np.linspace(0, 255, 16)).max() <= 1


def test_what_is_no_folder_of_images(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        ImageFolder(tmp_path)
    write(tmp_path, "Train/a/1.png", "val/a/2.png")
    with pytest.raises(ValueError, match=r"splits of a data set \(Train, val\)"):
        ImageFolder(tmp_path)
    write(tmp_path, "extra/3.png")  # one that is no split: then these are classes
    assert ImageFolder(tmp_path).class_names == ["Train", "extra", "val"]
    write(tmp_path, "loose.png")
    with pytest.raises(ValueError, match=r"mixes images \(loose\.png"):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="channels is 4"):
        ImageFolder(tmp_path, channels=4)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("stored", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_every_mode_becomes_grey_or_rgb(tmp_path, stored, channels, mode):
    write(tmp_path, "a.png", colour=(255, 255, 255), mode=stored)
    image, _ = ImageFolder(tmp_path, channels).load(0)
    assert image.mode == mode
    assert (np.asarray(image) == 255).all()


def test_a_palette_keeps_its_colours(tmp_path):
    write(tmp_path, "a.gif", colour=(10, 200, 30), mode="P")
    with Image.open(tmp_path / "a.gif") as stored:
        expected = np.asarray(stored.convert("RGB"))
    assert np.array_equal(np.asarray(ImageFolder(tmp_path).load(0)[0]), expected)
    assert abs(expected[0, 0].astype(int) - (10, 200, 30)).max() < 40  # the web palette is coarse


def test_cmyk_is_converted(tmp_path):
    write(tmp_path, "a.jpg", colour=(10, 200, 30), mode="CMYK")
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.mode == "CMYK"
    pixel = np.asarray(ImageFolder(tmp_path).load(0)[0])[0, 0].astype(int)
    assert abs(pixel - (10, 200, 30)).max() < 10


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture has to be turned right by a quarter
    stored = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    image, _ = ImageFolder(tmp_path, channels=1).load(0)
    assert np.array_equal(np.asarray(image), np.rot90(stored, -1))


@pytest.mark.parametrize("size", [None, 16, 24, 32, 64, 256])
def test_a_large_photograph_is_read_smaller_and_comes_out_the_same(size, tmp_path):
    astronaut = pytest.importorskip("skimage.data").astronaut()  # 512 x 512
    Image.fromarray(astronaut).save(tmp_path / "a.jpg", quality=95)
    whole, read = (read_image(tmp_path / "a.jpg", "a.jpg", wanted) for wanted in (None, size))
    assert read.width == {None: 512, 16: 64, 24: 128, 32: 128, 64: 256, 256: 512}[size]  # at least 4 times the size
    if size is not None:
        there, here = (np.asarray(central(image, size)).astype(int) for image in (whole, read))
        assert np.abs(there - here).mean() < 2  # of 255; each halving rounds, too


def test_what_is_small_or_no_jpeg_is_read_as_it_is(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 63, 3), np.uint8))
    for name, size in (("a.jpg", 8), ("a.png", 1), ("a.webp", 1)):
        image.save(tmp_path / name, quality=90)
        read = [np.asarray(read_image(tmp_path / name, name, wanted)) for wanted in (None, size)]
        assert np.array_equal(*read)


def test_a_large_photograph_is_turned_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((128, 64)).save(tmp_path / "a.jpg", exif=exif)  # black above, white below
    read = read_image(tmp_path / "a.jpg", "a.jpg", 4)
    assert read.size == (16, 32)
    assert np.asarray(read)[:, 0].min() > 240  # what was below is at the left


def test_sixteen_bits_keep_their_range(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    image, _ = ImageFolder(tmp_path, channels=1).load(0)
    assert np.abs(np.asarray(image)[0].astype(int) - (0, 128, 255)).max() <= 1


def truncated_png(path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    "spoil",
    [truncated_png, lambda path: path.write_bytes(b""), lambda path: path.write_text("no image"), Path.mkdir],
    ids=["truncated", "empty", "text", "folder"],
)
def test_a_broken_file_is_named(tmp_path, spoil):
    write(tmp_path, "cat/bad.png")
    source = ImageFolder(tmp_path)
    (tmp_path / "cat" / "bad.png").unlink()
    spoil(tmp_path / "cat" / "bad.png")
    with pytest.raises(BrokenImage, match=r"^cat/bad\.png: ."):
        source.load(0)


def test_a_long_text_in_an_image_is_no_damage(tmp_path):
    text = PngInfo()
    text.add_text("workflow", "node " * 400_000, zip=True)
    Image.new("L", (8, 8), 7).save(tmp_path / "a.png", pnginfo=text)
    assert read_image(tmp_path / "a.png", "a").getpixel((0, 0)) == 7


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_whatever_is_wrong_with_a_file_is_told_as_a_broken_image(suffix, tmp_path):
    """Pillow raises struct.error and TypeError, too, of EXIF that is damaged."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 12), "red").save(tmp_path / f"whole.{suffix}", exif=exif)
    whole, chance, read = (tmp_path / f"whole.{suffix}").read_bytes(), random.Random(0), 0
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(3):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        with suppress(BrokenImage):
            read_image(bytes(raw), "a")
            read += 1
    assert 0 < read < 400


def test_a_file_that_went_away_is_named(tmp_path):
    write(tmp_path, "a.png")
    source = ImageFolder(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BrokenImage, match=r"a\.png"):
        source.load(0)


def test_a_link_that_leads_nowhere_is_a_broken_image(tmp_path):
    write(tmp_path / "data", "a/1.png", "a/3.png")
    (tmp_path / "data/a/2.png").symlink_to(tmp_path / "gone.png")
    source = ImageFolder(tmp_path / "data")
    assert source.names == ["a/1.png", "a/2.png", "a/3.png"]
    with pytest.raises(BrokenImage, match=r"^a/2\.png: ."):
        source.load(1)
    write(tmp_path, "gone.png")
    back = ImageFolder(tmp_path / "data")
    assert back.load(1)[0].size == (4, 4)
    assert back.fingerprint != source.fingerprint


def test_a_folders_fingerprint_moves_with_it(tmp_path):
    write(tmp_path / "here", "a/1.png", "b/2.png")
    fingerprint = ImageFolder(tmp_path / "here").fingerprint
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert ImageFolder(tmp_path / "there").fingerprint == fingerprint
    write(tmp_path / "there", "b/3.png")
    assert ImageFolder(tmp_path / "there").fingerprint != fingerprint
    (tmp_path / "there" / "b" / "3.png").unlink()
    (tmp_path / "there" / "b").rename(tmp_path / "there" / "c")
    assert ImageFolder(tmp_path / "there").fingerprint != fingerprint  # other classes


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (255, 0, 0, 0)), ("LA", (10, 0))])
def test_what_is_transparent_is_white(mode, colour, tmp_path):
    Image.new(mode, (2, 2), colour).save(tmp_path / "a.png")
    image, _ = ImageFolder(tmp_path).load(0)
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_a_folders_fingerprint_is_of_the_contents_too(tmp_path, monkeypatch):
    prints = []
    for name, value in (("a", 3), ("b", 4), ("c", 3)):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4), value).save(tmp_path / name / "x.bmp")  # all of one size
        prints.append(ImageFolder(tmp_path / name).fingerprint)
    assert prints[0] == prints[2] != prints[1]
    monkeypatch.setattr("fpdm.data.sources.WHOLLY_HASHED", 0)  # as large sets: of a part of the files
    assert ImageFolder(tmp_path / "a").fingerprint != ImageFolder(tmp_path / "b").fingerprint
