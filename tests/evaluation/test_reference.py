"""Statistics of the real images: what is in them, what they are kept for, and what an interruption costs."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fpdm.data import ArraySource
from fpdm.evaluation import reference as module
from fpdm.evaluation.reference import BATCH, Reference, features_of, halves_of, identity_of, reference_for
from tests.evaluation.fakes import Projection, noise_source

COUNT = 5 * BATCH + 7  # three batches of half A, and three of half B, the last of either not full
SOURCE = noise_source(COUNT)


def made(path, source=SOURCE, extractor=None, size=8):
    return reference_for(source, size, extractor or Projection(), path / "statistics.safetensors", say=lambda _: None)


def tensors_of(path):
    with safe_open(path, "pt") as file:
        return {**file.metadata(), **{name: file.get_tensor(name).tolist() for name in file.keys()}}  # noqa: SIM118


# Halves

label_lists = st.lists(st.integers(0, 5), min_size=1, max_size=120)


@given(label_lists)
def test_the_halves_are_disjoint_and_cover_everything(labels):
    a, b = halves_of(labels)
    assert sorted(a + b) == list(range(len(labels)))


@given(label_lists)
def test_either_half_has_half_of_every_class(labels):
    for half in halves_of(labels):
        mine = [labels[number] for number in half]
        for label in set(labels):
            assert math.floor(labels.count(label) / 2) <= mine.count(label) <= math.ceil(labels.count(label) / 2)


@given(label_lists)
@example([0, 1, 1, 2, 3, 3, 4, 5, 5])
def test_the_first_images_of_a_half_are_spread_by_class(labels):
    """A class goes by steps of 2 / n_c: before any place, it is at most one image from its share of the way gone, and
    the way itself is off by the sum of what the classes are off."""
    classes = sorted(set(labels))
    shares = {c: labels.count(c) / len(labels) for c in classes}
    for half in halves_of(labels):
        counts = dict.fromkeys(classes, 0)
        for length, number in enumerate(half, start=1):
            counts[labels[number]] += 1
            for c in classes:
                assert abs(counts[c] - shares[c] * length) <= 1 + shares[c] * len(classes)


@given(st.integers(1, 8), st.integers(1, 20), st.randoms())
def test_equal_classes_are_taken_in_turn(classes, each, random):
    labels = list(range(classes)) * each
    random.shuffle(labels)
    for half in halves_of(labels):
        counts = np.zeros(classes, int)
        for number in half:
            counts[labels[number]] += 1
            assert counts.max() - counts.min() <= 1


def test_the_halves_are_chosen_at_random_and_always_alike():
    a, _ = halves_of(np.zeros(1000, np.int64))
    assert a == halves_of([0] * 1000)[0]
    assert abs(np.mean(a) - 499.5) < 4 * 1000 / math.sqrt(12 * 1000)
    assert len({number % 2 for number in a[:20]}) == 2
    assert a != sorted(a)


# What is in them


def by_hand(source, numbers, size=8):
    """Features of images of these numbers, one at a time."""
    arrays = [source.images[number] for number in numbers]
    images = [torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy()) for array in arrays]
    assert all(image.shape[1:] == (size, size) for image in images)
    return np.stack([features_of(Projection(), image[None])[0] for image in images]).astype(np.float64)


def test_the_moments_are_those_of_all_features(tmp_path):
    reference = made(tmp_path)
    features = by_hand(SOURCE, range(COUNT))
    assert reference.moments.count == reference.done == COUNT
    np.testing.assert_allclose(reference.moments.mean, features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(reference.moments.cov, np.cov(features.T), rtol=1e-5, atol=1e-6)


def test_either_half_keeps_its_moments_and_single_features(tmp_path):
    reference = made(tmp_path)
    for half, numbers in zip(reference.halves, halves_of(SOURCE.labels), strict=True):
        assert half.numbers == numbers
        features = by_hand(SOURCE, numbers)
        assert half.kept.dtype == np.float32
        np.testing.assert_allclose(half.kept, features, rtol=1e-6, atol=1e-6)
        assert half.moments.count == len(numbers)
        np.testing.assert_allclose(half.moments.mean, features.mean(0), rtol=1e-6)
        np.testing.assert_allclose(half.moments.cov, np.cov(features.T), rtol=1e-5, atol=1e-6)


def test_only_so_many_single_features_are_kept_and_the_moments_are_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_FEATURES", 2 * (BATCH + 10))
    reference = made(tmp_path)
    for half, numbers in zip(reference.halves, halves_of(SOURCE.labels), strict=True):
        assert half.numbers == numbers[: BATCH + 10]
        np.testing.assert_allclose(half.kept, by_hand(SOURCE, half.numbers), rtol=1e-6, atol=1e-6)
        assert half.moments.count == len(numbers)
    np.testing.assert_allclose(reference.moments.mean, by_hand(SOURCE, range(COUNT)).mean(0), rtol=1e-6)
    again = made(tmp_path)
    assert [half.numbers for half in again.halves] == [half.numbers for half in reference.halves]


def test_images_are_cropped_and_resized_as_for_training(tmp_path):
    source = noise_source(60, size=16)
    reference = made(tmp_path, source)
    averaged = source.images.reshape(60, 8, 2, 8, 2).mean((2, 4))
    for half in reference.halves:
        expected = by_hand(ArraySource(np.round(averaged).astype(np.uint8)), half.numbers)
        assert np.abs(half.kept - expected).max() < 0.15  # what rounding of 64 pixels makes


@pytest.mark.parametrize(("channels", "takes"), [(1, (3,)), (1, (1, 3)), (1, (1,)), (3, (3,))])
def test_a_network_is_handed_as_many_channels_as_it_takes(tmp_path, channels, takes):
    extractor = Projection(channels=takes)  # asserts them
    reference = made(tmp_path, noise_source(40, channels=channels), extractor)
    assert extractor.seen == reference.moments.count == 40


def test_grey_images_have_equal_channels_for_an_rgb_network():
    images = torch.from_numpy(SOURCE.images[:4, None])
    grey = features_of(Projection(channels=(3,)), images)
    assert np.array_equal(grey, features_of(Projection(channels=(3,)), images.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("count", [1, 2, 9, 16, 200])
def test_some_features_are_of_either_half_alike(tmp_path, count):
    reference = made(tmp_path)
    some = reference.some(count)
    assert len(some) == len(np.unique(some, axis=0)) == count
    from_a, from_b = (sum((row == half.kept).all(1).any() for row in some) for half in reference.halves)
    assert 0 <= from_a - from_b <= 1


@pytest.mark.parametrize(
    "source",
    [
        ArraySource(SOURCE.images[:7], np.array([0, 1, 1, 2, 3, 3, 4]), list("abcde")),
        noise_source(41, broken=set(range(0, 41, 4))),
    ],
    ids=["odd classes", "broken images"],
)
def test_some_features_are_as_many_as_asked_for_though_the_halves_differ(tmp_path, source):
    reference = made(tmp_path, source)
    assert len(reference.halves[0].kept) != len(reference.halves[1].kept)
    for count in range(1, reference.moments.count + 1):
        assert len(np.unique(reference.some(count), axis=0)) == count


def test_images_that_cannot_be_read_are_counted_and_left_out(tmp_path):
    broken = {3, 50, 51, COUNT - 1}
    source = noise_source(COUNT, broken=broken)
    reference = made(tmp_path, source)
    assert (reference.broken, reference.done, reference.moments.count) == (4, COUNT, COUNT - 4)
    assert broken.isdisjoint(reference.halves[0].numbers + reference.halves[1].numbers)
    readable = [number for number in range(COUNT) if number not in broken]
    np.testing.assert_allclose(reference.moments.mean, by_hand(source, readable).mean(0), rtol=1e-6)
    assert made(tmp_path, source).broken == 4


def test_a_whole_batch_that_cannot_be_read(tmp_path):
    broken = set(halves_of(SOURCE.labels)[0][:BATCH])
    extractor = Projection()
    reference = made(tmp_path, noise_source(COUNT, broken=broken), extractor)
    assert (reference.broken, reference.moments.count, extractor.seen) == (BATCH, COUNT - BATCH, COUNT - BATCH)


def test_images_of_which_none_can_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="read"):
        made(tmp_path, noise_source(30, broken=set(range(30))))
    assert not (tmp_path / "statistics.safetensors").exists()


# Kept


def test_what_is_kept_is_read_and_not_computed_again(tmp_path):
    first, extractor = made(tmp_path), Projection()
    before = (tmp_path / "statistics.safetensors").stat().st_mtime_ns
    again = made(tmp_path, extractor=extractor)
    assert extractor.calls == 0
    assert (tmp_path / "statistics.safetensors").stat().st_mtime_ns == before
    assert again.identity == first.identity == identity_of(SOURCE, 8, Projection())
    assert (again.done, again.broken) == (first.done, first.broken)
    for mine, theirs in zip(again.halves, first.halves, strict=True):
        assert mine.numbers == theirs.numbers
        assert np.array_equal(mine.kept, theirs.kept)
        assert np.array_equal(mine.moments.mean, theirs.moments.mean)
        assert np.array_equal(mine.moments.scatter, theirs.moments.scatter)
        assert mine.moments.count == theirs.moments.count


def test_a_folder_is_made_for_them_and_nothing_else_is_left_there(tmp_path):
    made(tmp_path / "some/where")
    assert [path.name for path in (tmp_path / "some/where").glob("[!.]*")] == ["statistics.safetensors"]


def test_a_moved_data_set_is_the_same(tmp_path):
    made(tmp_path)
    made(tmp_path, ArraySource(SOURCE.images.copy(), SOURCE.labels.copy(), SOURCE.class_names), Projection(stop=1))


@pytest.mark.parametrize(
    ("change", "words", "others"),
    [
        ({"source": noise_source(COUNT, seed=1)}, ["data fingerprint is"], ["images", "size", "weights"]),
        ({"source": noise_source(COUNT - 1)}, [f"data images is {COUNT}, not {COUNT - 1}"], ["size", "weights"]),
        ({"source": noise_source(COUNT, channels=3)}, ["preprocessing channels is 1, not 3"], ["size", "weights"]),
        ({"size": 4}, ["preprocessing size is 8, not 4"], ["data", "weights"]),
        ({"extractor": Projection("b")}, ["features weights is 'a', not 'b'"], ["data", "size"]),
        ({"extractor": Projection("b"), "size": 16}, ["features weights", "size is 8, not 16"], ["data"]),
    ],
)
def test_statistics_of_something_else_are_refused_naming_what_differs(tmp_path, change, words, others):
    made(tmp_path)
    path = tmp_path / "statistics.safetensors"
    before = path.read_bytes()
    with pytest.raises(ValueError, match="of something else") as refusal:
        made(tmp_path, **change)
    said = str(refusal.value)
    assert str(path) in said
    assert all(word in said for word in words), said
    assert not any(f"{word} is" in said for word in others), said
    assert path.read_bytes() == before


def test_another_network_is_named(tmp_path):
    made(tmp_path)
    other = Projection()
    other.identity = {"network": "another", "weights": "a", "preprocessing": "bicubic"}
    with pytest.raises(ValueError, match=r"features network is 'projection', not 'another'.*preprocessing is None"):
        made(tmp_path, extractor=other)


def test_an_older_format_is_refused(tmp_path, monkeypatch):
    made(tmp_path)
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    with pytest.raises(ValueError, match="an older format"):
        made(tmp_path)


def header_of(path, **changes):
    """Write the statistics again with another header."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, {**header, **changes})


def without(path, name):
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({key: value for key, value in load_file(path).items() if key != name}, path, header)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "beginning only": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no statistics"),
    "no header": lambda path: save_file({"weight": torch.zeros(3)}, path),
    "another header": lambda path: save_file({"weight": torch.zeros(3)}, path, {"format": "pt"}),
    "identity damaged": lambda path: header_of(path, identity="{"),
    "identity empty": lambda path: header_of(path, identity="{}"),
    "identity a list": lambda path: header_of(path, identity="[]"),
    "count damaged": lambda path: header_of(path, done="many"),
    "no mean": lambda path: without(path, "0.mean"),
    "no numbers": lambda path: without(path, "1.numbers"),
}


@pytest.mark.parametrize("spoil", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_statistics_are_refused_by_name(tmp_path, spoil):
    made(tmp_path)
    path = tmp_path / "statistics.safetensors"
    spoil(path)
    with pytest.raises(ValueError, match=r"statistics\.safetensors"):
        made(tmp_path)


def test_a_folder_in_their_place_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "statistics.safetensors").mkdir()
    extractor = Projection()
    with pytest.raises((ValueError, OSError), match=r"statistics\.safetensors"):
        made(tmp_path, extractor=extractor)
    assert extractor.calls == 0


# Interruptions


def interrupted(path, call, source=SOURCE, error=KeyboardInterrupt):
    with pytest.raises(error):
        made(path, source, Projection(stop=call, error=error))
    assert not (path / "statistics.safetensors").exists()


@pytest.mark.parametrize("call", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("broken", [set(), {0, 7, 8, 90, COUNT - 1}], ids=["whole", "broken"])
def test_going_on_is_the_same_as_not_having_stopped(tmp_path, call, broken):
    source = noise_source(COUNT, broken=broken)
    made(tmp_path / "whole", source)
    interrupted(tmp_path, call, source)
    assert (tmp_path / "statistics.safetensors.partial").is_file()
    made(tmp_path, source)
    assert not (tmp_path / "statistics.safetensors.partial").exists()
    assert tensors_of(tmp_path / "statistics.safetensors") == tensors_of(tmp_path / "whole/statistics.safetensors")


def test_what_is_done_is_not_done_again(tmp_path):
    interrupted(tmp_path, 4)
    extractor, said = Projection(), []
    reference_for(SOURCE, 8, extractor, tmp_path / "statistics.safetensors", said.append)
    done = 2 * BATCH + len(halves_of(SOURCE.labels)[0]) % BATCH
    assert extractor.seen == COUNT - done
    assert len(said) == 1
    assert f"{done} of {COUNT} are done" in said[0]


def test_it_may_be_stopped_again_and_again(tmp_path):
    made(tmp_path / "whole")
    for _ in range(5):
        interrupted(tmp_path, 2)
    made(tmp_path, extractor=Projection(stop=2))
    assert tensors_of(tmp_path / "statistics.safetensors") == tensors_of(tmp_path / "whole/statistics.safetensors")


def test_an_interrupt_in_a_batch_with_a_broken_image_costs_that_batch_only(tmp_path):
    first = halves_of(SOURCE.labels)[0]
    source = noise_source(COUNT, broken={first[BATCH + 3]})
    interrupted(tmp_path, 2, source)
    extractor = Projection()
    made(tmp_path, source, extractor)
    assert extractor.seen == COUNT - 1 - BATCH


def test_now_and_then_it_is_saved_in_case_the_process_is_killed(tmp_path, monkeypatch):
    made(tmp_path / "whole")
    monkeypatch.setattr(module, "SAVE_EVERY", -1)
    interrupted(tmp_path, 3, error=MemoryError)
    assert Reference.load(tmp_path / "statistics.safetensors.partial").done == 2 * BATCH
    extractor = Projection()
    made(tmp_path, extractor=extractor)
    assert extractor.seen == COUNT - 2 * BATCH
    assert tensors_of(tmp_path / "statistics.safetensors") == tensors_of(tmp_path / "whole/statistics.safetensors")


def test_what_was_begun_of_something_else_is_begun_anew(tmp_path):
    interrupted(tmp_path, 3)
    extractor = Projection("b")
    reference = made(tmp_path, extractor=extractor)
    assert extractor.seen == COUNT
    assert reference.identity["features"]["weights"] == "b"


def test_what_does_not_add_up_is_begun_anew(tmp_path):
    made(tmp_path / "whole")
    interrupted(tmp_path, 3)
    partial = tmp_path / "statistics.safetensors.partial"
    header_of(partial, done=str(BATCH))
    extractor = Projection()
    made(tmp_path, extractor=extractor)
    assert extractor.seen == COUNT
    assert tensors_of(tmp_path / "statistics.safetensors") == tensors_of(tmp_path / "whole/statistics.safetensors")


def test_the_identity_is_of_all_that_settles_them():
    identity = identity_of(SOURCE, 8, Projection())
    assert json.loads(json.dumps(identity)) == identity
    others = [
        identity_of(noise_source(COUNT, seed=1), 8, Projection()),
        identity_of(SOURCE, 16, Projection()),
        identity_of(SOURCE, 8, Projection("b")),
        identity_of(noise_source(COUNT, channels=3), 8, Projection()),
    ]
    assert all(other != identity for other in others)


def test_a_damaged_beginning_is_begun_anew(tmp_path):
    (tmp_path / "statistics.safetensors.partial").write_bytes(b"torn")
    assert made(tmp_path).moments.count == len(SOURCE)
    assert not (tmp_path / "statistics.safetensors.partial").exists()
