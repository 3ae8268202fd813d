"""What a word on the command line means, with a kind and without, and what all sources have in common."""

import io
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpdm.data import KINDS, ArraySource, HubImages, ImageFolder, Shards, digits, open_images, write_npz
from fpdm.data.open import kind_of
from tests.data.pictures import number_of, picture, pixels_of
from tests.data.test_arrays import write_idx
from tests.data.test_shards import samples, write_shards, write_tar


def write_folder(root):
    for i in range(4):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[i % 2] / f"{i}.png").write_bytes(picture(i))


def write_saved(root):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    columns = {"image": [{"bytes": picture(i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(root)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """kind -> place, of images 0 to 3 where they can be in colour."""
    monkeypatch.setenv("FPDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "folder")
    write_idx(tmp_path / "idx", 4, "train")
    write_npz(tmp_path / "images.npz", [pixels_of(i) for i in range(4)], 4, np.arange(4) % 2)
    write_saved(tmp_path / "saved")
    write_shards(tmp_path / "shards", 3, 1)
    return {"digits": "digits", "folder": "folder", "idx": "idx", "npz": "images.npz", "datasets": "saved",
            "shards": "shards"}  # fmt: skip


CLASSES = {"digits": ArraySource, "folder": ImageFolder, "idx": ArraySource, "npz": ArraySource,
           "datasets": HubImages, "shards": Shards}  # fmt: skip
KNOWN = [kind for kind in KINDS if kind != "auto"]
# `datasets` reads folders of images and tar files too; of the others, each refuses what it is not.
CONTRADICTIONS = [
    (asked, there)
    for asked in KNOWN
    for there in KNOWN
    if asked != there and (asked, there) not in (("datasets", "folder"), ("datasets", "shards"))
]


@pytest.mark.parametrize("kind", KNOWN)
def test_what_a_place_holds_is_seen_or_told(places, kind):
    place = places[kind]
    assert kind_of(place) == kind
    seen, told = open_images(place), open_images(place, kind=kind)
    assert type(seen) is type(told) is CLASSES[kind]
    assert seen.fingerprint == told.fingerprint
    assert len(seen) == len(seen.labels) == sum(seen.chunks)


def test_folders_beside_tar_files_are_no_classes_unless_they_hold_images(places):
    Path("shards/latents").mkdir()
    Path("shards/latents/index.json").write_text("{}")
    assert kind_of("shards") == "shards"
    shutil.copytree("folder", "shards/images")
    assert kind_of("shards") == "folder"


@pytest.mark.parametrize("kind", ["folder", "npz", "datasets", "shards"])
def test_every_kind_holds_the_same_images(places, kind):
    source = open_images(places[kind])
    assert sorted(number_of(source.load(i)[0]) for i in range(len(source))) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["folder", "datasets", "shards"])
def test_every_kind_reads_large_photographs_at_the_size_that_is_wanted(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("FPDM_CACHE", str(tmp_path / "cache"))
    file = io.BytesIO()
    Image.linear_gradient("L").save(file, "JPEG")  # 256 x 256
    place = tmp_path / "images"
    if kind == "folder":
        place.mkdir()
        (place / "0.jpg").write_bytes(file.getvalue())
    elif kind == "datasets":
        datasets = pytest.importorskip("datasets")
        rows = {"image": [{"bytes": file.getvalue(), "path": None}]}
        datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()})).save_to_disk(place)
    else:
        place.mkdir()
        write_tar(place / "0.tar", ("0.jpg", file.getvalue()))
    assert [open_images(str(place), size=size).load(0)[0].width for size in (None, 8, 32, 64)] == [256, 32, 128, 256]


@pytest.mark.parametrize(("asked", "there"), CONTRADICTIONS)
def test_another_kind_than_is_there_is_refused_by_name(places, asked, there):
    with pytest.raises(ValueError, match=rf"It looks like .*: ask for kind '{there}' \(--source {there}\)$") as refusal:
        open_images(places[there], kind=asked)
    assert places[there] in str(refusal.value)


def test_datasets_reads_a_folder_of_images_too(places, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = open_images(places["folder"], kind="datasets")
    assert isinstance(source, HubImages)
    assert source.class_names == ["a", "b"]


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown kind of data 'shard'\. Did you mean 'shards'"):
        open_images("digits", kind="shard")


@pytest.mark.parametrize("place", ["shards/data-000.tar", "shards/data-{000..001}.tar", "shards/*.tar"])
def test_tar_files_are_shards(places, place):
    assert isinstance(open_images(place), Shards)


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("hub:some/where", "datasets"),
        ("https://example.org/data-{000..012}.tar", "shards"),
        ("http://example.org/a.tar?version=1", "shards"),
        ("a.tar.gz", "shards"),
        ("nowhere.tar", "shards"),
        ("nowhere.npz", None),
        ("nowhere", None),
    ],
)
def test_what_is_not_on_this_disk(places, place, kind):
    assert kind_of(place) == kind


def test_a_name_on_the_hub(places, monkeypatch):
    asked = []
    monkeypatch.setattr("fpdm.data.open.hub_images", lambda *arguments: asked.append(arguments))
    open_images("hub:some/where", 1, "validation[:10%]")
    open_images("some/where", kind="datasets")
    assert asked == [("some/where", "validation[:10%]", 1, None), ("some/where", "train", 3, None)]


def test_a_folder_of_shards_may_hold_what_tells_of_them(places, tmp_path):
    for name in ("classes.txt", "README.md", "sizes.json"):
        (tmp_path / "shards" / name).write_text("a\nb\nc\n")
    assert kind_of("shards") == "shards"
    (tmp_path / "shards/image.PNG").write_bytes(picture(0))
    assert kind_of("shards") == "folder"


def test_a_folder_of_images_with_a_tar_file_is_one_of_images(places, tmp_path):
    write_tar(tmp_path / "folder/all.tar", *samples(0, 1))
    assert kind_of("folder") == "folder"
    assert len(open_images("folder")) == 4


def test_the_digits_stay_a_word_where_a_folder_is_called_so(places, tmp_path):
    write_folder(tmp_path / "digits")
    assert open_images("digits").fingerprint == digits().fingerprint
    assert len(open_images("./digits")) == len(open_images("digits", kind="folder")) == 4


@pytest.mark.parametrize("kind", ["npz", "shards", "folder"])
def test_a_split_that_such_data_has_not(places, kind):
    for given in (kind, "auto"):
        with pytest.raises(ValueError, match="no split 'test', only folders of IDX files have"):
            open_images(places[kind], split="test", kind=given)


def test_channels_are_those_asked_for(places):
    for kind in ("folder", "datasets", "shards"):
        source = open_images(places[kind], 1)
        assert (source.channels, source.load(0)[0].mode) == (1, "L")


def test_a_spawned_process_reads_the_same(places):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for kind in ("folder", "datasets", "shards"):
            source = open_images(places[kind])
            here = [source.load(i) for i in range(len(source))]
            there = pool.map(source.load, range(len(source)))
            assert [label for _, label in here] == [label for _, label in there]
            for (one, _), (other, _) in zip(here, there, strict=True):
                assert isinstance(other, Image.Image)
                assert one.tobytes() == other.tobytes()
