"""Data sets of Hugging Face's `datasets`: saved to disk, or files that it knows. Nothing is asked of the hub."""

import importlib.util
import pickle
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from fpdm.data import BrokenImage, HubImages, ImagePreparation, Stream, hub_images
from tests.data.pictures import gather, number_of, picture, pixels_of

datasets = pytest.importorskip("datasets")

CLASSES = ["ant", "cat", "dog"]
FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No hub, and no cache but the test's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def data(count=6, features=None, **columns):
    """Rows of an image as it is stored, and its number modulo 3 as label."""
    columns = {
        "image": [{"bytes": picture(i), "path": None} for i in range(count)],
        "label": [i % 3 for i in range(count)],
        **columns,
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features({**FEATURES, **(features or {})}))


def saved(folder, rows):
    rows.save_to_disk(folder)
    return folder


def numbers(source):
    return [number_of(source.load(i)[0]) for i in range(len(source))]


# What is opened


def test_a_folder_that_was_saved(tmp_path):
    source = hub_images(saved(tmp_path / "a", data()))
    assert (len(source), source.channels, source.chunks) == (6, 3, (6,))
    assert source.class_names == CLASSES
    assert numbers(source) == list(range(6))
    assert source.labels.tolist() == [source.load(i)[1] for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_folder_of_splits(tmp_path):
    folder = saved(tmp_path / "a", datasets.DatasetDict(train=data(6), held_out=data(2)))
    assert (len(hub_images(folder)), len(hub_images(folder, "held_out"))) == (6, 2)
    with pytest.raises(ValueError, match=r"unknown split 'held'. Did you mean 'held_out'\?.* train, held_out"):
        hub_images(folder, "held")


def test_a_part_that_was_saved_alone_has_one_split(tmp_path):
    folder = saved(tmp_path / "a", data())
    with pytest.raises(ValueError, match="it holds one part only: leave out the split 'test'") as refusal:
        hub_images(folder, "test")
    assert str(folder) in str(refusal.value)


def write_folder(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def test_a_folder_of_images(tmp_path):
    folder = write_folder(tmp_path / "a", "train/cat/0.png", "train/dog/1.png", "test/dog/2.png", "test/cat/3.png")
    source, test = hub_images(folder), hub_images(folder, "test")
    assert (numbers(source), source.class_names) == ([0, 1], ["cat", "dog"])
    assert sorted(numbers(test)) == [2, 3]
    assert len(hub_images(folder, "train[:1]")) == 1
    with pytest.raises(ValueError, match=r"split 'val': Unknown split \"val\""):
        hub_images(folder, "val")


def test_images_without_classes(tmp_path):
    source = hub_images(write_folder(tmp_path / "a", "0.png", "1.png"))
    assert (numbers(source), source.class_names, source.labels.tolist()) == ([0, 1], [], [0, 0])


@pytest.mark.parametrize("name", ["a.parquet", "*.parquet", ""])
def test_files(tmp_path, name):
    (tmp_path / "a").mkdir()
    data().to_parquet(tmp_path / "a/a.parquet")
    source = hub_images(tmp_path / "a" / name)
    assert (numbers(source), source.class_names) == (list(range(6)), CLASSES)


def test_names_on_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((*names, split)) or data())
    monkeypatch.chdir(tmp_path)
    assert numbers(hub_images("some/where")) == list(range(6))
    hub_images("some/where:large", "validation[:10%]")
    (tmp_path / "a:b").mkdir()
    hub_images("a:b")
    assert asked == [
        ("some/where", None, "train"),
        ("some/where", "large", "validation[:10%]"),
        ("a:b", "train"),
    ]


@pytest.mark.parametrize("place", ["nowhere", "some/where", "./nowhere", "empty"])
def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"datasets cannot open {place}, split 'train': ."):
        hub_images(place)


def test_without_the_package_its_extra_is_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else real(name))
    with pytest.raises(ImportError, match=r"pip install 'fpdm\[datasets\]'"):
        hub_images("some/where")


# Columns


def test_columns_may_have_any_name(tmp_path):
    rows = data().rename_columns({"image": "img", "label": "kind"})
    source = hub_images(saved(tmp_path / "a", rows))
    assert (numbers(source), source.class_names) == (list(range(6)), CLASSES)


@pytest.mark.parametrize(("name", "kind"), [("label", "int64"), ("labels", "uint8")])
def test_whole_numbers_called_labels_are_classes(tmp_path, name, kind):
    rows = data().cast_column("label", datasets.Value(kind)).rename_columns({} if name == "label" else {"label": name})
    source = hub_images(saved(tmp_path / "a", rows))
    assert (source.class_names, source.load(2)[1]) == (["0", "1", "2"], 2)


def test_other_numbers_are_not(tmp_path):
    rows = data().cast_column("label", datasets.Value("int64")).rename_column("label", "number")
    source = hub_images(saved(tmp_path / "a", rows))
    assert (source.class_names, source.load(2)[1]) == ([], 0)


@pytest.mark.parametrize("kind", ["string", "float32"])
def test_labels_that_are_no_whole_numbers_are_not_and_it_is_told_what_makes_them_classes(tmp_path, kind):
    rows = data().cast_column("label", datasets.Value(kind))
    with pytest.warns(UserWarning, match=rf"column label is of {kind}.*class_encode_column\('label'\)"):
        source = hub_images(saved(tmp_path / "a", rows))
    assert (source.class_names, source.load(2)[1]) == ([], 0)
    encoded = hub_images(saved(tmp_path / "b", rows.class_encode_column("label")))
    assert (len(encoded.class_names), encoded.load(2)[1]) == (3, 2)


def test_several_classes_of_an_image_are_none_which_is_told(tmp_path):
    several = data().remove_columns("label").add_column("label", [[0, 1]] * 6)
    rows = several.cast_column("label", datasets.Sequence(datasets.ClassLabel(names=CLASSES)))
    with pytest.warns(UserWarning, match="column label is of List, and taken for no classes: an image has one class"):
        assert hub_images(saved(tmp_path / "a", rows)).class_names == []


def test_class_labels_go_before_numbers(tmp_path):
    rows = data().rename_column("label", "kind").add_column("label", [5] * 6)
    assert hub_images(saved(tmp_path / "a", rows)).class_names == CLASSES


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (lambda: data().remove_columns("image"), r"no column of images, only: label \(ClassLabel\)"),
        (
            lambda: data(features={"mask": datasets.Image()}, mask=[None] * 6),
            "several columns of images: image, mask. Keep one with `select_columns`",
        ),
        (
            lambda: data(features={"fine": datasets.ClassLabel(3)}, fine=[0] * 6),
            "several columns of class labels: label, fine",
        ),
        (lambda: data(label=[0, None, 1, None, 1, 1]), "column label has no label in 2 of 6 rows"),
        (lambda: data(label=[-1] * 6), "column label has labels from -1 to -1; they must count from 0"),
        (lambda: data(0), "it holds no images"),
    ],
)
def test_what_is_unclear_is_refused(rows, text):
    with pytest.raises(ValueError, match=text):
        HubImages(rows())


def test_a_refusal_names_the_data(tmp_path):
    folder = saved(tmp_path / "a", data().remove_columns("image"))
    with pytest.raises(ValueError, match=f"^{folder}, split 'train': it has no column of images"):
        hub_images(folder)


# Images


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_are_made_grey_or_rgb(tmp_path, channels, mode):
    source = hub_images(saved(tmp_path / "a", data()), channels=channels)
    assert (source.channels, source.load(0)[0].mode) == (channels, mode)
    with pytest.raises(ValueError, match="channels is 4"):
        hub_images(tmp_path / "a", channels=4)


def test_images_are_read_as_files_are(tmp_path):
    """`datasets` would hand out the first lying on its side, and the second all white."""
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(deep)
    stored = [{"bytes": picture(3, exif=turned), "path": None}, {"bytes": deep.read_bytes(), "path": None}]
    source = hub_images(saved(tmp_path / "a", data(image=stored, label=[0, 1])))
    assert np.array_equal(np.asarray(source.load(0)[0]), np.rot90(pixels_of(3), -1))
    assert np.abs(np.asarray(source.load(1)[0])[0, :, 0].astype(int) - (0, 128, 255)).max() <= 1


def test_a_broken_image_is_named_by_its_row(tmp_path):
    stored = [{"bytes": content, "path": None} for content in (picture(0), b"", b"no image", picture(3)[:-40])]
    source = hub_images(saved(tmp_path / "a", data(image=[*stored, None], label=[0, 1, 2, 0, 1])))
    assert numbers_of_whole(source) == [0]
    for index in range(1, 5):
        with pytest.raises(BrokenImage, match=f"^row {index}: ."):
            source.load(index)


def numbers_of_whole(source):
    found = []
    for index in range(len(source)):
        with suppress(BrokenImage):
            found.append(number_of(source.load(index)[0]))
    return found


def test_a_file_that_went_away_is_named(tmp_path):
    source = hub_images(write_folder(tmp_path / "a", "0.png", "1.png"))
    (tmp_path / "a/1.png").unlink()
    assert number_of(source.load(0)[0]) == 0
    with pytest.raises(BrokenImage, match=r"^row 1: .*1\.png"):
        source.load(1)


def test_another_format_and_other_indices_of_the_data_do_not_matter(tmp_path):
    rows = data().select([4, 2, 0])
    assert numbers(hub_images(saved(tmp_path / "a", rows.with_format("torch")))) == [4, 2, 0]


# Fingerprints


def test_the_fingerprint_is_of_the_contents(tmp_path):
    fingerprint = hub_images(saved(tmp_path / "a", data())).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    data().to_parquet(tmp_path / "c.parquet")
    assert hub_images(tmp_path / "b").fingerprint == fingerprint
    assert hub_images(tmp_path / "c.parquet").fingerprint == fingerprint
    other = [{"bytes": picture(i + (i == 5)), "path": None} for i in range(6)]
    others = [data(5), data(7), data(label=[0, 1, 2, 0, 1, 1]), data(image=other)]
    found = {hub_images(saved(tmp_path / f"{i}", rows)).fingerprint for i, rows in enumerate(others)}
    assert len(found | {fingerprint}) == 5


def test_of_images_that_lie_in_files_too(tmp_path):
    folder = write_folder(tmp_path / "a", "0.png", "1.png")
    fingerprint = hub_images(folder).fingerprint
    shutil.move(folder, tmp_path / "b")
    assert hub_images(tmp_path / "b").fingerprint == fingerprint
    (tmp_path / "b/1.png").write_bytes(picture(7))
    assert hub_images(tmp_path / "b").fingerprint != fingerprint


# In a stream


def stream_of(source):
    return Stream(source, ImagePreparation(3, "random", flip=True), batch_size=6, seed=0)


@pytest.mark.parametrize(("ranks", "workers"), [(3, 0), (1, 2)])
def test_processes_and_workers_see_the_same_images(tmp_path, ranks, workers):
    source = hub_images(saved(tmp_path / "a", data(20)))
    whole, shared = gather(stream_of(source)), gather(stream_of(source), ranks, workers)
    assert whole.keys() == shared.keys()
    assert all(torch.equal(whole[key][0], shared[key][0]) and whole[key][1] == shared[key][1] for key in whole)


def test_a_copy_reads_the_same(tmp_path):
    source = hub_images(saved(tmp_path / "a", data()))
    assert numbers(pickle.loads(pickle.dumps(source))) == numbers(source)
