"""Shards of webdataset: grouped as webdataset does, read one by one, and named where they are damaged."""

import io
import json
import os
import pickle
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fpdm.data import BrokenImage, ImagePreparation, Shards, Stream
from fpdm.data.shards import braces, shard_paths
from fpdm.data.tars import index_of, make_index
from tests.data.pictures import gather, number_of, picture

webdataset = pytest.importorskip("webdataset")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, also for what is kept there by chance."""
    monkeypatch.setenv("FPDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_tar(path, *members):
    """A tar file of (name, content), whatever the names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(first, last):
    """Images and labels (their number modulo 3), as members."""
    return [
        pair for i in range(first, last) for pair in ((f"{i:04}.png", picture(i)), (f"{i:04}.cls", b"%d" % (i % 3)))
    ]


def write_shards(folder, *sizes):
    """Shards of so many samples each, numbered through."""
    ends = np.cumsum(sizes).tolist()
    for shard, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        write_tar(folder / f"data-{shard:03}.tar", *samples(end - size, end))
    return folder


def numbers(source):
    return [number_of(source.load(i)[0]) for i in range(len(source))]


# What is in them


def test_what_webdataset_writes_is_read_back(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "data-%06d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"some/where/{i:03}", "png": picture(i), "cls": i % 3, "json": {"caption": "x"}})
    source = Shards(tmp_path)
    assert (len(source), source.chunks, source.channels) == (10, (4, 4, 2), 3)
    assert numbers(source) == list(range(10))
    assert source.labels.tolist() == [i % 3 for i in range(10)] == [source.load(i)[1] for i in range(10)]
    assert source.class_names == ["0", "1", "2"]
    assert source.names[3] == "some/where/003.png"


def as_webdataset_does(path):
    """(key, image) of the samples that have an image, in webdataset's grouping."""
    with path.open("rb") as file:
        members = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
        groups = list(webdataset.tariterators.group_by_keys(members))
    return [(sample["__key__"], sample["png"]) for sample in groups if "png" in sample]


names = st.lists(
    st.sampled_from(
        ["a.png", "a.txt", "b.png", "a.b.txt", "d/a.png", "d/a.txt", "d.e/a.png", "x/d.e/a.PNG", ".a.png", "plain",
         "__meta__.png", "__meta__/a.png", "d/__a__.png", "c.txt", "d/.png"]
    ),
    unique_by=str.lower,
)  # fmt: skip


@settings(deadline=None)
@given(names)
@example(["a.png", "b.png", "a.txt"])  # what does not follow belongs to another sample
@example(["d/a.png", "a.png"])
def test_members_are_grouped_as_webdataset_does(tmp_path_factory, found):
    path = tmp_path_factory.getbasetemp() / "grouped.tar"
    write_tar(path, *((name, picture(i)) for i, name in enumerate(found)))
    index, content = make_index(path), path.read_bytes()
    images = [content[start : start + size] for start, size in zip(index.offsets, index.sizes, strict=True)]
    keys = [name[: -len(".png")] for name in index.names]
    assert list(zip(keys, images, strict=True)) == as_webdataset_does(path)


@pytest.mark.parametrize(
    ("members", "labels"),
    [
        ([("a.cls", b" 2\n")], [2]),
        ([("a.json", b'{"label": 3}')], [3]),
        ([("a.json", b'{"class": 4, "label": "cat"}')], [4]),
        ([("a.json", b'{"label": 3}'), ("a.cls", b"1")], [1]),
        ([("a.json", b'{"label": true, "class": 1.5}')], None),
        ([("a.json", b"[1]")], None),
        ([("a.txt", b"a cat")], None),
    ],
)
def test_labels(tmp_path, members, labels):
    write_tar(tmp_path / "a.tar", ("a.png", picture(0)), *members)
    assert index_of(tmp_path / "a.tar").labels == labels
    source = Shards(tmp_path / "a.tar")
    assert source.class_names == ([] if labels is None else [str(i) for i in range(labels[0] + 1)])
    assert source.load(0)[1] == (labels or [0])[0]


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ([("a.cls", b"cat")], r"a\.cls is not a whole number: b'cat'"),
        ([("a.cls", b"-1")], r"a\.cls has label -1; labels must count from 0"),
        ([("a.json", b"{")], r"a\.json is not JSON"),
        ([("a.json", b"\xff")], r"a\.json is not JSON"),
        ([("a.json", b'{"label": -7}')], r"a\.json has label -7"),
        ([("a.jpg", b"")], r"which is the image of sample a: a\.png, a\.jpg\?"),
        ([("a.PNG", b"")], r"sample a has a suffix twice: png, png"),
        ([("a.cls", b"1"), ("b.png", b"")], "some samples have a label and b has none"),
    ],
)
def test_samples_that_are_unclear_are_refused_by_name(tmp_path, members, text):
    write_tar(tmp_path / "a.tar", ("a.png", picture(0)), *members)
    with pytest.raises(ValueError, match=text) as refusal:
        Shards(tmp_path)
    assert str(tmp_path / "a.tar") in str(refusal.value)


def test_the_image_of_a_sample(tmp_path):
    beside = [("a.seg.png", b""), ("a.png", picture(0))]
    alone = [("b.v2.png", picture(1)), ("b.txt", b"")]
    write_tar(tmp_path / "a.tar", *beside, *alone, ("c.txt", b"no image"), ("c.heic", b""), ("d", b""))
    with pytest.warns(UserWarning, match=r"are left out, 1 in .*, such as a\.tar/c\.txt, c\.heic\. "):
        source = Shards(tmp_path)
    assert source.names == ["a.png", "b.v2.png"]
    assert numbers(source) == [0, 1]


def test_shards_with_and_without_labels_do_not_go_together(tmp_path):
    write_shards(tmp_path, 2)
    write_tar(tmp_path / "more.tar", ("a.png", picture(0)))
    with pytest.raises(ValueError, match=r"data-000\.tar has labels and .*more\.tar has none"):
        Shards(tmp_path)


def test_a_shard_without_images_is_passed_over(tmp_path):
    write_shards(tmp_path, 2, 2)
    write_tar(tmp_path / "data-000a.tar", ("a.txt", b"no image"))
    with pytest.warns(UserWarning, match=r"left out, 1 in .*, such as data-000a\.tar/a\.txt"):
        assert Shards(tmp_path).chunks == (2, 2)
    with pytest.raises(ValueError, match=r"hold no images: .* 1 samples without, such as data-000a\.tar/a\.txt"):
        Shards(tmp_path / "data-000a.tar")


@pytest.mark.parametrize(("name", "text"), [("classes.json", '["a", "b", "c"]'), ("classes.txt", "a\nb\nc\n")])
def test_classes_have_names_beside_the_shards(tmp_path, name, text):
    write_shards(tmp_path, 4)
    (tmp_path / name).write_text(text)
    assert Shards(tmp_path).class_names == ["a", "b", "c"]


@pytest.mark.parametrize("text", ['["a", "b"]', '{"a": 1, "b": 2, "c": 3}', "[1, 2, 3]", "{"])
def test_names_that_do_not_fit_the_classes_are_refused(tmp_path, text):
    write_shards(tmp_path, 4)
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=r"classes\.json"):
        Shards(tmp_path)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_are_made_grey_or_rgb(tmp_path, channels, mode):
    source = Shards(write_shards(tmp_path, 1), channels)
    assert (source.channels, source.load(0)[0].mode) == (channels, mode)
    with pytest.raises(ValueError, match="channels is 2"):
        Shards(tmp_path, 2)


# Where they are


def test_places(tmp_path, monkeypatch):
    write_shards(tmp_path, 1, 2, 3)
    write_tar(tmp_path / ".hidden.tar", *samples(0, 1))
    monkeypatch.chdir(tmp_path)
    every = [Path(f"data-{i:03}.tar") for i in range(3)]
    assert shard_paths(".") == shard_paths("*.tar") == shard_paths("data-{000..002}.tar") == every
    assert shard_paths("data-{002,000}.tar") == [every[2], every[0]]
    assert shard_paths("data-00[12].tar") == every[1:]
    assert shard_paths("data-001.tar") == every[1:2]
    (tmp_path / "odd{1,2}.tar").write_bytes(b"")
    assert shard_paths("odd{1,2}.tar") == [Path("odd{1,2}.tar")]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("data-{000..004}.tar", r"2 of the 5 shards .* are not there, the first data-003\.tar"),
        ("nowhere.tar", r"1 of the 1 shards nowhere\.tar are not there"),
        ("nowhere-*.tar", r"there are no shards nowhere-\*\.tar: name tar files"),
        ("data-{3..1}.tar", "there are no shards"),
        ("empty", "there are no shards empty"),
        ("a.tar.gz", "compressed.* unpack it"),
        ("a.tgz", "compressed"),
        ("https://example.org/a.tar.zst", "compressed"),
        ("data-000.tar", r"data-000\.tar is compressed.*gunzip"),
    ],
)
def test_places_that_are_refused(tmp_path, monkeypatch, place, text):
    monkeypatch.chdir(write_shards(tmp_path, 1, 1, 1))
    (tmp_path / "empty").mkdir()
    if place == "data-000.tar":
        (tmp_path / place).write_bytes(b"\x1f\x8b\x08 what gzip writes")
    with pytest.raises(ValueError, match=text):
        Shards(place)


@pytest.mark.parametrize(
    "pattern", ["a", "{0..3}", "{08..11}.tar", "{a,b}{1..2}", "{a,b{1..3}}", "{000..2}", "{,x}y", "{5..5}", "{a}"]
)
def test_braces_are_those_of_webdataset(pattern):
    theirs = pytest.importorskip("braceexpand").braceexpand(pattern)
    assert sorted(braces(pattern)) == sorted(theirs)


# Damage


def test_a_broken_image_is_named_and_the_others_are_read(tmp_path):
    write_tar(tmp_path / "a.tar", ("a.png", picture(0)), ("d/b.png", b"no image"), ("c.png", picture(2)[:-40]))
    source = Shards(tmp_path)
    assert number_of(source.load(0)[0]) == 0
    for index, name in ((1, r"a\.tar/d/b\.png: it is no image"), (2, r"a\.tar/c\.png: ")):
        with pytest.raises(BrokenImage, match=f"^{name}"):
            source.load(index)


def test_a_shard_that_went_away_is_named(tmp_path):
    source = Shards(write_shards(tmp_path, 1))
    (tmp_path / "data-000.tar").unlink()
    with pytest.raises(BrokenImage, match=r"^data-000\.tar/0000\.png: "):
        source.load(0)


def test_a_truncated_shard_keeps_its_whole_samples(tmp_path):
    path = write_tar(tmp_path / "a.tar", *samples(0, 4))
    raw = path.read_bytes()
    whole = index_of(path)
    starts = [offset - 512 for offset in whole.offsets]
    for length in range(512, len(raw) - 2 * 512, 256):
        path.write_bytes(raw[:length])
        index = make_index(path)
        # A sample is known to be whole once the next one has begun.
        expected = max((i for i in range(4) if starts[i] + 512 <= length), default=0)
        if starts[3] + 4 * 512 <= length and index.fault is None:  # the end is there: only padding was cut off
            expected = 4
        assert len(index.names) == expected
        assert (index.fault is None) == (expected == 4)
        assert (index.names, index.labels) == (whole.names[:expected], (whole.labels or [])[:expected])


def test_a_truncated_shard_is_named_in_a_warning_each_time(tmp_path):
    write_shards(tmp_path, 4, 4)
    path = tmp_path / "data-001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    for _ in range(2):  # the second time from the index that was kept
        with pytest.warns(UserWarning, match=r"data-001\.tar ends early .* first 1 samples are used"):
            source = Shards(tmp_path)
        assert numbers(source) == [0, 1, 2, 3, 4]


def index_or_refusal(path):
    try:
        return make_index(path)
    except ValueError as error:
        return str(error)


def test_whatever_header_is_damaged_a_shard_is_read_up_to_there_or_refused_by_name(tmp_path):
    path = write_tar(tmp_path / "a.tar", *samples(0, 3))
    raw = path.read_bytes()
    whole = make_index(path)
    heads = [offset - 512 for offset in whole.offsets]
    for head in heads:
        for place in range(head, head + 512, 5):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x15]) + raw[place + 1 :])
            index = index_or_refusal(path)
            if head == 0 and isinstance(index, str):  # only the first header tells whether this is a tar file
                assert index.startswith(f"{path} is damaged")
            elif index == whole:  # the byte after the check sum is of no account
                assert 148 <= place - head < 156
            else:
                assert index.fault is not None
                assert index.names == whole.names[: max(0, heads.index(head) - 1)]


@pytest.mark.parametrize("raw", [b"", b"no tar file", picture(0), b"\0" * 100, b"x" * 4096])
def test_what_is_no_tar_file_is_refused_by_name(tmp_path, raw):
    write_shards(tmp_path, 1)
    (tmp_path / "more.tar").write_bytes(raw)
    with pytest.raises(ValueError, match=r"more\.tar is damaged, or not a tar file"):
        Shards(tmp_path)


# The index


def test_a_shard_is_indexed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    write_shards(tmp_path, 3)
    first = Shards(tmp_path)
    made = []
    monkeypatch.setattr("fpdm.data.tars.make_index", lambda path: made.append(path) or make_index(path))
    again = Shards(tmp_path)
    assert made == []
    assert (again.names, again.fingerprint) == (first.names, first.fingerprint)
    assert again.labels.tolist() == first.labels.tolist()
    write_tar(tmp_path / "data-000.tar", *samples(5, 7))
    assert numbers(Shards(tmp_path)) == [5, 6]
    status = (tmp_path / "data-000.tar").stat()
    os.utime(tmp_path / "data-000.tar", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    Shards(tmp_path)
    assert len(made) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"stamp": 3}', b"\xff"])
def test_a_damaged_index_is_made_again(tmp_path, damage):
    write_shards(tmp_path, 3)
    Shards(tmp_path)
    (kept,) = tmp_path.glob(".*.index.json")
    kept.write_bytes(damage)
    assert numbers(Shards(tmp_path)) == [0, 1, 2]
    assert json.loads(kept.read_text())["index"]["names"] == ["0000.png", "0001.png", "0002.png"]


def test_an_index_made_where_fewer_formats_are_known_is_made_again(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", ("a.png", picture(0)), ("b.jfif", picture(1)))
    with monkeypatch.context() as patch:
        patch.setattr("fpdm.data.tars.EXTENSIONS", (".png",))
        with pytest.warns(UserWarning, match="left out"):
            assert Shards(tmp_path).names == ["a.png"]
    assert Shards(tmp_path).names == ["a.png", "b.jfif"]


def test_where_nothing_can_be_written_the_index_is_in_the_cache(tmp_path, cache, monkeypatch):
    write_shards(tmp_path / "data", 3)
    (tmp_path / "data/.data-000.tar.index.json").mkdir()  # also root cannot put a file in its place
    Shards(tmp_path / "data")
    assert len(list((cache / "shards").glob("*-data-000.tar.index.json"))) == 1
    monkeypatch.setattr("fpdm.data.tars.make_index", lambda path: pytest.fail("it was kept"))
    assert numbers(Shards(tmp_path / "data")) == [0, 1, 2]


def test_where_no_index_can_be_kept_shards_are_read_all_the_same(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", 3)
    (tmp_path / "data/.data-000.tar.index.json").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("FPDM_CACHE", str(tmp_path / "file"))
    assert numbers(Shards(tmp_path / "data")) == [0, 1, 2]


# Fingerprints


def test_the_fingerprint_moves_with_the_shards_and_changes_with_them(tmp_path):
    fingerprint = Shards(write_shards(tmp_path / "a", 3, 2)).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/data-000.tar").rename(tmp_path / "b/data-0.tar")
    assert Shards(tmp_path / "b").fingerprint == fingerprint
    name, content = samples(0, 5)[-2]
    others = [
        samples(0, 5)[:-2],
        [*samples(0, 5)[:-1], ("0004.cls", b"0")],
        [*samples(0, 5)[:-2], (f"d{name}", content), ("d0004.cls", b"1")],
        [*samples(0, 5)[:-2], (name, content[:50] + b"x" + content[51:]), ("0004.cls", b"1")],
    ]
    found = {fingerprint, Shards(write_shards(tmp_path / "c", 2, 3)).fingerprint}
    for i, members in enumerate(others):
        found.add(Shards(write_tar(tmp_path / f"{i}.tar", *members)).fingerprint)
    assert len(found) == 6


# In a stream


def stream_of(folder, batch_size=6):
    return Stream(Shards(folder), ImagePreparation(3, "random", flip=True), batch_size=batch_size, seed=0)


@pytest.mark.parametrize(("ranks", "workers"), [(3, 0), (1, 2)])
def test_processes_and_workers_see_the_same_images(tmp_path, ranks, workers):
    folder = write_shards(tmp_path, *[2] * 10)
    whole, shared = gather(stream_of(folder)), gather(stream_of(folder), ranks, workers)
    assert whole.keys() == shared.keys() == {(step, slot) for step in range(5) for slot in range(6)}
    assert all(torch.equal(whole[key][0], shared[key][0]) and whole[key][1] == shared[key][1] for key in whole)


def test_a_resumed_run_sees_what_an_unbroken_one_does(tmp_path):
    folder = write_shards(tmp_path, *[2] * 10)
    whole, resumed = gather(stream_of(folder)), gather(stream_of(folder), first=3)
    assert all(torch.equal(whole[key][0], image) for key, (image, _) in resumed.items())


def test_a_copy_reads_the_same(tmp_path):
    source = Shards(write_shards(tmp_path, 3, 2))
    assert numbers(pickle.loads(pickle.dumps(source))) == numbers(source)


def test_reading_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers(Shards(write_shards(tmp_path, 2)))
