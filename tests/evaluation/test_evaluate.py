"""The instrument, on samples of which it is known how good they are: real images, noise, copies, one class only."""

import dataclasses
import itertools
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from fpdm.data import ArraySource, digits, open_images
from fpdm.evaluation import EXTRACTORS, Evaluation, Instrument, Measure, Samples, open_samples, reference
from fpdm.evaluation import evaluate as module
from fpdm.evaluation.evaluate import default_features
from fpdm.evaluation.extractors import classifier
from fpdm.evaluation.result import significant
from tests.evaluation.fakes import Projection, noise_source

CARRIED = str(Path(str(files("fpdm.evaluation"))) / "classifiers/digits.safetensors")
DIGITS = digits()
SHUFFLED = np.random.default_rng(0).permutation(len(DIGITS))  # as they come, they are sorted by who wrote them
CLASSES = [SHUFFLED[DIGITS.labels[SHUFFLED] == c] for c in range(10)]
SHOWN = np.stack([numbers[:60] for numbers in CLASSES], axis=1).ravel()  # what samples are measured against
OTHERS = np.stack([numbers[60:80] for numbers in CLASSES], axis=1).ravel()  # 20 of each class, taken in turn


def samples_of(images, labels=None):
    source = ArraySource(images, labels, [] if labels is None else list("0123456789"))
    return Samples(source, images.shape[1])


def real(numbers=OTHERS):
    """A perfect model: digits that the instrument has not seen."""
    return samples_of(DIGITS.images[numbers], DIGITS.labels[numbers])


def noise(count=200):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8), np.uint8)
    return samples_of(images, np.arange(count) % 10)


def measured(instrument, samples, picture=None):
    return instrument.measure(samples, picture, progress=False)


def saved(path, images, labels=None):
    np.savez(path, images, *([] if labels is None else [labels]))
    return str(path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def instrument(cache):
    """600 digits, 60 of each class, by the classifier that the package carries."""
    data = saved(cache / "digits.npz", DIGITS.images[SHOWN], DIGITS.labels[SHOWN])
    return Instrument.open(data, 8, features="classifier", weights=CARRIED, cache=cache)


@pytest.fixture(scope="module")
def perfect(instrument, cache):
    (cache / "pictures").mkdir()
    return measured(instrument, real(), cache / "pictures/nearest.png")


@pytest.fixture
def projected(monkeypatch, tmp_path):
    """Opens instruments that see a source by a random projection, which takes no time."""

    def opened(source, size=8, distance="FD-projection"):
        monkeypatch.setattr(Projection, "distance", distance)
        monkeypatch.setitem(EXTRACTORS, "projection", lambda weights, device: Projection())
        monkeypatch.setattr(module, "open_images", lambda *_, **__: source)
        return Instrument.open("noise", size, features="projection", cache=tmp_path / "cache")

    return opened


# Samples of known quality

ALL = [
    "FD-classifier",
    "kernel distance",
    "precision",
    "recall",
    "density",
    "coverage",
    "accuracy",
    "nearest real image",
    "near copies",
]


def test_a_perfect_model_is_at_the_floor(perfect):
    assert [measure.name for measure in perfect.measures] == ALL
    assert perfect["FD-classifier"].value < 3 * perfect["FD-classifier"].floor
    assert abs(perfect["kernel distance"].value) < 0.02
    for name in ("precision", "recall", "density", "coverage"):
        assert abs(perfect[name].value - perfect[name].floor) < 0.12, name
    assert perfect["accuracy"].value > 0.95
    nearest = perfect["nearest real image"]
    assert 0.7 * nearest.floor < nearest.value < 1.3 * nearest.floor


def test_what_is_told_of_the_floors(perfect, instrument):
    assert (perfect.samples, perfect.compared) == (200, 200)
    assert perfect.floor == (200, 400)
    assert perfect.real == {"name": instrument.name, "images": 600, "broken": 0}
    assert 0 < perfect.halves < perfect["FD-classifier"].floor * 2
    assert perfect["accuracy"].floor == instrument.extractor.accuracy
    assert perfect.identity == instrument.reference.identity
    better = {measure.name: measure.better for measure in perfect.measures}
    assert [better[name] for name in ALL] == ["lower"] * 2 + ["higher"] * 5 + ["floor", "lower"]


def test_noise_is_terrible(instrument, perfect):
    found = measured(instrument, noise())
    assert found["FD-classifier"].low > 20 * perfect["FD-classifier"].high
    assert found["kernel distance"].low > 0.3
    assert found["precision"].value < 0.15
    assert found["density"].value < 0.15
    assert found["recall"].value < 0.3
    assert found["coverage"].value < 0.2
    assert found["accuracy"].value < 0.3
    assert found["nearest real image"].low > 1.5 * found["nearest real image"].floor


def test_copies_of_real_images_are_told(instrument):
    copies = measured(instrument, real(SHOWN[100:300]))
    near = copies["nearest real image"]
    assert (near.low, near.value, near.high) == pytest.approx((0, 0, 0), abs=1e-4)
    assert near.floor > 1
    assert copies["near copies"].value == 1
    assert copies["FD-classifier"].value < copies["FD-classifier"].floor


def test_copies_are_told_among_real_images_that_are_there_twice(cache):
    twice = np.concatenate([SHOWN, SHOWN[:30]])
    data = saved(cache / "twice.npz", DIGITS.images[twice], DIGITS.labels[twice])
    instrument = Instrument.open(data, 8, features="classifier", weights=CARRIED, cache=cache)
    copies = measured(instrument, real(SHOWN[100:300]))["near copies"]
    assert copies.value == 1
    assert copies.floor == pytest.approx(60 / 630 + 0.01 * 570 / 630, abs=0.003), "those, and the nearest of the others"
    assert measured(instrument, real())["near copies"].high < 0.1


def test_without_classes_a_perfect_model_is_at_the_floor_too(projected):
    """Two classes that are far apart: how many there are of each is then most of a distance."""
    images = np.random.default_rng(0).integers(0, 40, (2000, 8, 8), np.uint8)
    images[1::2] += 200
    instrument = projected(ArraySource(images, np.arange(2000) % 2, ["dark", "light"]))
    chance, floors = np.random.default_rng(1), []
    for labels in (None, np.arange(200) % 2):
        values = []
        for _ in range(20):
            drawn = chance.integers(0, 40, (200, 8, 8), np.uint8)
            drawn[(chance.random(200) < 0.5) if labels is None else labels == 1] += 200
            found = measured(
                instrument, Samples(ArraySource(drawn, labels, [] if labels is None else ["dark", "light"]), 8)
            )
            values.append(found.measures[0].value)
        floors.append(found.measures[0].floor)
        assert floors[-1] / 8 < np.mean(values) < 8 * floors[-1]
    assert floors[0] > 2 * floors[1]


def test_what_is_there_needs_no_place_to_write_to(cache, instrument, monkeypatch):
    path = cache / "kept/statistics.safetensors"
    asked = {"features": "classifier", "weights": CARRIED, "cache": cache, "statistics": path}
    Instrument.open(instrument.name, 8, **asked)
    for module_ in (module, reference, classifier):
        monkeypatch.setattr(module_, "check_writable", lambda *_: pytest.fail("it wants to write"))
    assert Instrument.open(instrument.name, 8, **asked).reference.identity == instrument.reference.identity
    Instrument.open(instrument.name, 8, **{**asked, "statistics": None})


def test_a_few_copies_among_others_show_as_such(instrument):
    numbers = OTHERS.copy()
    numbers[:40] = SHOWN[100:140]
    few = measured(instrument, real(numbers))
    assert few["nearest real image"].value > 0.7 * few["nearest real image"].floor, "the median does not tell"
    assert few["near copies"].value >= 0.2
    assert few["near copies"].low > 0.1
    assert measured(instrument, real())["near copies"].high < 0.1


def test_one_class_only_is_precise_and_covers_little(instrument, perfect):
    found = measured(instrument, real(CLASSES[3][60:]))
    assert found["precision"].value > 0.7
    assert found["recall"].value < 0.3
    assert found["coverage"].value < 0.2
    assert found["FD-classifier"].low > 10 * perfect["FD-classifier"].high


def test_the_wrong_classes_are_told_by_the_accuracy_alone(instrument, perfect):
    wrong = measured(instrument, samples_of(DIGITS.images[OTHERS], (DIGITS.labels[OTHERS] + 1) % 10))
    assert wrong["accuracy"].high < 0.05
    for name in ("precision", "recall", "density", "coverage", "nearest real image"):
        assert wrong[name].value == perfect[name].value
    assert wrong["FD-classifier"].value == perfect["FD-classifier"].value


def test_worse_samples_are_farther(instrument, perfect):
    """Digits under more and more noise."""
    chance = np.random.default_rng(0).standard_normal((len(OTHERS), 8, 8))
    images = [np.clip(DIGITS.images[OTHERS] + sigma * chance, 0, 255).astype(np.uint8) for sigma in (60, 120)]
    found = [perfect, *(measured(instrument, samples_of(part, DIGITS.labels[OTHERS])) for part in images)]
    for name in ("FD-classifier", "kernel distance"):
        for better, worse in itertools.pairwise(found):
            assert better[name].high < worse[name].low


def test_an_interval_is_around_its_value(perfect):
    for measure in perfect.measures:
        assert measure.low <= measure.value <= measure.high, measure.name
        if measure.name != "nearest real image":
            assert measure.low < measure.high
    assert perfect["FD-classifier"].low >= 0


@pytest.mark.parametrize("name", ["precision", "recall", "coverage", "accuracy"])
def test_the_interval_of_a_share_is_of_shares(perfect, name):
    assert perfect[name].low >= 0
    assert perfect[name].high <= 1


# What does not matter, and what does


def test_the_same_samples_have_the_same_numbers_by_an_instrument_opened_again(instrument, perfect, cache, monkeypatch):
    monkeypatch.setattr(reference, "compute", lambda *_: pytest.fail("the statistics are computed again"))
    data = str(cache / "digits.npz")
    again = Instrument.open(data, 8, features="classifier", weights=CARRIED, cache=cache)
    torch.manual_seed(5)
    np.random.seed(5)
    assert measured(again, real()) == perfect


def test_the_order_of_the_samples_hardly_matters(instrument, perfect):
    found = measured(instrument, real(OTHERS[::-1]))
    for name in ALL:
        assert found[name].value == pytest.approx(perfect[name].value, abs=1e-4), name


def test_grey_samples_saved_as_rgb_have_the_same_numbers(instrument, perfect):
    coloured = samples_of(np.repeat(DIGITS.images[OTHERS][..., None], 3, axis=3), DIGITS.labels[OTHERS])
    assert measured(instrument, coloured) == perfect


def test_without_classes_there_is_no_accuracy(instrument, perfect):
    found = measured(instrument, samples_of(DIGITS.images[OTHERS]))
    assert [measure.name for measure in found.measures] == [name for name in ALL if name != "accuracy"]
    assert found["FD-classifier"].value == pytest.approx(perfect["FD-classifier"].value)
    assert found["precision"].value == pytest.approx(perfect["precision"].value, abs=0.1)


def test_samples_sorted_by_class_are_measured_as_shuffled_ones(instrument):
    """More of them than are compared pair by pair: the first ones would be of some of the classes only."""
    shuffled = np.random.default_rng(0).permutation(SHOWN.tolist() + OTHERS.tolist())
    ordered = shuffled[np.argsort(DIGITS.labels[shuffled], kind="stable")]
    one, other = measured(instrument, real(shuffled)), measured(instrument, real(ordered))
    assert one.compared < one.samples
    for measure in one.measures:
        tolerance = 0.05 * max(1, abs(measure.value))
        assert other[measure.name].value == pytest.approx(measure.value, abs=tolerance), measure.name


def test_numbered_samples_are_not_matched_to_classes_by_names_that_are_numbers_too():
    images, labels = np.zeros((60, 8, 8), np.uint8), np.arange(60) % 12
    samples = Samples(ArraySource(images, labels, list(map(str, range(12)))), 8)
    assert samples.labels(sorted(map(str, range(12)))) == labels.tolist()  # 0, 1, 10, 11, 2, ...


def test_samples_of_another_size_are_refused(instrument):
    images = np.zeros((60, 16, 16), np.uint8)
    with pytest.raises(ValueError, match="16 x 16, not 8 x 8"):
        measured(instrument, samples_of(images))


def test_coloured_samples_are_refused_where_the_data_is_grey(instrument):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"in colour \(number 0 is\).*grey"):
        measured(instrument, samples_of(images))


def test_they_are_refused_before_anything_is_computed_where_it_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "reference_in", lambda *_: pytest.fail("it computes statistics"))
    with pytest.raises(ValueError, match="in colour and the real images in digits are grey: name others"):
        Instrument.open("digits", 8, channels=3, cache=tmp_path)


@pytest.mark.parametrize("count", [50, 65])
def test_few_samples_are_measured_and_said_to_be_few(instrument, count):
    found = measured(instrument, real(OTHERS[:count]))
    assert (found.samples, found.compared) == (count, count)
    assert found.floor == (count, 600 - count)
    assert any("64 features" in note for note in found.notes) == (count < 64)
    assert not any("colours" in note for note in found.notes), "the real images have none"
    assert found["FD-classifier"].value < 5 * found["FD-classifier"].floor


def test_more_samples_than_half_of_the_real_images_are_noted(instrument):
    found = measured(instrument, real(np.concatenate([numbers[60:92] for numbers in CLASSES])))
    assert (found.samples, found.compared) == (320, 300)
    assert found.floor == (300, 300)
    assert any("floor" in note for note in found.notes)


# The picture


def shown(path, rows=2, side=32):
    """The images in a picture, row by row, each made small again."""
    with Image.open(path) as picture:
        array = np.asarray(picture.convert("L"))
    columns = array.shape[1] // (side + 2)
    assert array.shape[0] == rows * (side + 2) + 2
    cells = [
        [array[2 + row * (side + 2) :, 2 + column * (side + 2) :][:side:4, :side:4] for column in range(columns)]
        for row in range(rows)
    ]
    return np.array(cells)


def test_the_nearest_real_images_are_drawn_below_the_samples(instrument, tmp_path):
    numbers = np.concatenate([OTHERS[:60], SHOWN[40:53]])  # 13 copies among them
    measured(instrument, real(numbers), tmp_path / "nearest.png")
    upper, lower = shown(tmp_path / "nearest.png")
    assert len(upper) == len(lower) == 10
    assert np.array_equal(upper, lower)
    copied = {image.tobytes() for image in DIGITS.images[SHOWN[40:53]]}
    assert {image.tobytes() for image in upper} <= copied
    assert [path.name for path in tmp_path.iterdir()] == ["nearest.png"]


def test_the_nearest_are_similar_where_there_are_no_copies(perfect, cache):
    assert perfect["nearest real image"].low > 0
    upper, lower = shown(cache / "pictures/nearest.png").astype(float)
    among = {image.tobytes() for image in DIGITS.images[SHOWN]}
    assert {image.astype(np.uint8).tobytes() for image in lower} <= among
    apart = np.abs(upper - lower).mean((1, 2))
    others = np.abs(upper - lower[::-1]).mean((1, 2))
    assert apart.mean() < 0.7 * others.mean()


def test_the_picture_of_coloured_images_is_coloured(projected, tmp_path):
    instrument = projected(noise_source(120, channels=3))
    samples = Samples(noise_source(60, channels=3, seed=1), 8)
    measured(instrument, samples, tmp_path / "nearest.png")
    with Image.open(tmp_path / "nearest.png") as picture:
        assert picture.mode == "RGB"


# What is written


def test_an_evaluation_survives_a_file(perfect):
    kept = json.loads(json.dumps(perfect.to_dict(), allow_nan=False))
    assert Evaluation.from_dict(kept) == perfect
    assert isinstance(Evaluation.from_dict(kept).measures[0], Measure)


def test_an_evaluation_reads_as_a_table(perfect):
    lines = str(perfect).splitlines()
    assert lines[0].startswith("200 samples against 600 images of ")
    assert "8 x 8" in lines[0]
    assert "features of classifier" in lines[0]
    assert [line.split("  ")[0] for line in lines[2 : 2 + len(ALL)]] == ALL
    assert "200 against 400" in lines[2 + len(ALL)]
    noted = dataclasses.replace(perfect, notes=("note: this",))
    assert str(noted).splitlines()[-1] == "note: this"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.345, "12.3"), (0.0012345, "0.00123"), (-0.5, "-0.5"), (1.2345e-6, "1.2e-06"), (-1e-7, "-1.0e-07")],
)
def test_three_digits_are_shown(value, text):
    assert significant(value) == text


# Opening


def test_the_features_that_are_taken_by_default():
    assert default_features(DIGITS, 8) == default_features(DIGITS, 32) == "classifier"
    assert default_features(DIGITS, 33) == "efficientnet-lite0"
    assert default_features(ArraySource(DIGITS.images), 8) == "efficientnet-lite0"
    assert default_features(noise_source(9, channels=3), 8) == "efficientnet-lite0"


def test_the_digits_need_nothing_but_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier.Classifier, "train", lambda *_: pytest.fail("a classifier is trained"))
    opened = Instrument.open("digits", 8, cache=tmp_path)
    assert (opened.name, opened.extractor.name) == ("digits", "classifier")
    assert [path.name[:11] for path in tmp_path.glob("[!.]*")] == ["statistics-"]
    assert opened.reference.moments.count == 1797


def test_statistics_are_kept_where_they_are_asked_for(tmp_path):
    data = saved(tmp_path / "a.npz", DIGITS.images[SHOWN], DIGITS.labels[SHOWN])
    place = tmp_path / "some/where.safetensors"
    Instrument.open(data, 8, weights=CARRIED, statistics=place, cache=tmp_path / "cache")
    assert place.is_file()
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"where\.safetensors are of something else: data fingerprint"):
        Instrument.open("digits", 8, statistics=place, cache=tmp_path / "cache")


def test_statistics_in_the_cache_do_not_meet(projected, tmp_path):
    opened = [projected(source, size) for source in (noise_source(90), noise_source(90, seed=1)) for size in (8, 10)]
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 4
    assert [instrument.size for instrument in opened] == [8, 10, 8, 10]


def saved_folder(path, images, labels=None):
    for i, image in enumerate(images):
        folder = path if labels is None else path / str(labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    return str(path)


def test_grey_samples_are_measured_against_real_images_in_grey(tmp_path, monkeypatch):
    """Those of a model that was trained with --channels 1 on coloured images."""
    monkeypatch.setitem(EXTRACTORS, "projection", lambda weights, device: Projection())
    coloured = noise_source(300, channels=3).images
    grey = [np.asarray(Image.fromarray(image).convert("L")) for image in coloured]
    data, samples = saved_folder(tmp_path / "data", coloured), open_samples(saved_folder(tmp_path / "samples", grey))
    opened = Instrument.open(data, 8, channels=samples.channels, features="projection", cache=tmp_path / "cache")
    found = measured(opened, samples)
    assert found["FD-projection"].value == pytest.approx(0, abs=1e-6)
    assert found["precision"].value > 0.9
    assert found["near copies"].value == 1
    assert "colours are not measured" in " ".join(found.notes)


def test_statistics_and_classifiers_in_grey_and_in_colour_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "MOST_STEPS", 5)
    data = saved_folder(tmp_path / "data", DIGITS.images[SHOWN], DIGITS.labels[SHOWN])
    for channels in (3, 1):
        opened = Instrument.open(data, 8, channels=channels, features="classifier", cache=tmp_path / "cache")
        assert opened.source.channels == opened.extractor.header["channels"] == channels
    assert len(list((tmp_path / "cache").glob("statistics-*.safetensors"))) == 2


def test_a_folder_of_tiny_grey_images_is_seen_by_the_classifier(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "MOST_STEPS", 5)
    data = saved_folder(tmp_path / "data", DIGITS.images[SHOWN], DIGITS.labels[SHOWN])
    assert Instrument.open(data, 8, channels=1, cache=tmp_path / "cache").extractor.name == "classifier"


def write_idx(folder, split, numbers):
    for part, array in (("images-idx3", DIGITS.images[numbers]), ("labels-idx1", DIGITS.labels[numbers])):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / f"{split}-{part}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())


def test_the_test_split_is_seen_by_a_classifier_of_the_training_split(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "MOST_STEPS", 20)
    write_idx(tmp_path, "train", SHOWN)
    write_idx(tmp_path, "t10k", OTHERS)
    opened = Instrument.open(str(tmp_path), 8, split="test", cache=tmp_path / "cache")
    train = open_images(str(tmp_path))
    assert opened.name == f"{tmp_path} (test)"
    assert opened.extractor.header["data"] == train.fingerprint != opened.source.fingerprint
    assert opened.reference.moments.count == len(OTHERS)
    copies = measured(opened, samples_of(DIGITS.images[SHOWN][:100]))  # of what there is to train on
    assert copies["near copies"].value < 0.1
    assert any("among the test images only" in note for note in copies.notes)


def test_a_test_split_without_one_to_train_on_takes_a_classifier_that_has_learned(tmp_path):
    write_idx(tmp_path, "t10k", OTHERS)
    asked = {"split": "test", "features": "classifier", "cache": tmp_path / "cache"}
    with pytest.raises(
        ValueError, match=r"'test' is measured, .* learns from 'train': .*\(--weights\), .*\(--features"
    ):
        Instrument.open(str(tmp_path), 8, **asked)
    assert Instrument.open(str(tmp_path), 8, weights=CARRIED, **asked).reference.moments.count == len(OTHERS)


def test_copies_are_looked_for_among_the_images_to_train_on(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "MOST_STEPS", 20)
    write_idx(tmp_path, "train", SHOWN)
    write_idx(tmp_path, "t10k", OTHERS)
    both = {"split": "test", "cache": tmp_path / "cache"}
    plain = Instrument.open(str(tmp_path), 8, **both)
    opened = Instrument.open(str(tmp_path), 8, copies_of=str(tmp_path), **both)
    samples = samples_of(DIGITS.images[SHOWN][:100])
    found, before = measured(opened, samples, tmp_path / "nearest.png"), measured(plain, samples)
    assert found["near copies"].value == 1
    assert found["nearest real image"].value == pytest.approx(0, abs=1e-3)
    assert before["nearest real image"].value > 0.5 * found["nearest real image"].floor, "of other images"
    upper, lower = shown(tmp_path / "nearest.png")
    assert np.array_equal(upper, lower)
    where = f"note: copies are looked for among {len(SHOWN):,} of the {len(SHOWN):,} images of {tmp_path}"
    assert any(note.startswith(where) for note in found.notes)
    assert found.originals == {
        "name": str(tmp_path),
        "fingerprint": open_images(str(tmp_path)).fingerprint,
        "images": len(SHOWN),
        "searched": len(SHOWN),
        "broken": 0,
    }
    assert before.originals is None
    assert not any("--copies-of" in note for note in found.notes)
    others = [measure for measure in found.measures if measure.name not in ("near copies", "nearest real image")]
    assert set(others) < set(before.measures), "all else is against the test images"
    assert found.identity == before.identity


@pytest.mark.parametrize(
    ("shape", "message"),
    [((60, 8, 8, 3), r"trained.npz are in colour, those of digits grey"), ((49, 8, 8), r"trained.npz has 49 images")],
)
def test_images_to_train_on_are_many_and_of_the_same_kind(shape, message, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "trained.npz", noise)
    with pytest.raises(ValueError, match=message):
        Instrument.open("digits", 8, copies_of=str(tmp_path / "trained.npz"), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists(), "before anything is computed"


def save_images(folder, images, broken=0):
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    for number in range(broken):
        (folder / f"{number:03d}.png").write_bytes(b"none")
    return str(folder)


def test_images_to_train_on_that_cannot_be_read_are_told_and_many_are_refused(tmp_path):
    few = save_images(tmp_path / "few", DIGITS.images[:80], broken=10)
    opened = Instrument.open("digits", 8, copies_of=few, cache=tmp_path / "cache")
    found = measured(opened, samples_of(DIGITS.images[10:90]))
    assert found.originals["broken"] == 10
    assert found["near copies"].value == pytest.approx(70 / 80)
    assert any(f"among 70 of the 80 images of {few}, of which 10 could not be read" in note for note in found.notes)
    none = save_images(tmp_path / "none", DIGITS.images[:80], broken=40)
    with pytest.raises(ValueError, match="none has 40 images that can be read"):
        Instrument.open("digits", 8, copies_of=none, cache=tmp_path / "cache")


def test_images_to_train_on_are_read_as_the_real_ones_are(tmp_path, monkeypatch):
    """Grey samples, beside real images of an array in colour."""
    monkeypatch.setitem(EXTRACTORS, "projection", lambda weights, device: Projection())
    colours = np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "held.npz", colours[:60])
    trained = save_images(tmp_path / "trained", colours[60:])
    held, cache = str(tmp_path / "held.npz"), tmp_path / "cache"
    opened = Instrument.open(held, 8, channels=1, features="projection", copies_of=trained, cache=cache)
    assert opened.source.channels == opened.originals.source.channels == 3
    assert measured(opened, Samples(noise_source(60), 8)).originals["searched"] == 60


def test_real_images_that_cannot_be_read_are_noted(projected):
    instrument = projected(noise_source(120, broken={5, 70}))
    found = measured(instrument, Samples(noise_source(60, seed=1), 8))
    assert found.real == {"name": "noise", "images": 118, "broken": 2}
    assert "note: 2 real images could not be read and were left out" in found.notes


def test_broken_images_are_not_counted_as_compared(projected):
    instrument = projected(noise_source(80, broken=set(range(0, 80, 4))))
    found = measured(instrument, Samples(noise_source(60, seed=1), 8))
    assert found.samples == 60
    assert found.real["images"] == 60
    assert found.compared <= 30


@pytest.mark.parametrize("count", [1, 2, 9])
def test_too_few_real_images_are_refused_before_any_sample_is_drawn(projected, count):
    with pytest.raises(ValueError, match="images"):
        projected(noise_source(count))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_distance_is_that_of_the_features(projected, channels):
    """Moments of pixels through a linear map, computed otherwise."""
    source, drawn = noise_source(200, channels=channels), noise_source(100, channels=channels, seed=1)
    found = measured(projected(source), Samples(drawn, 8))
    images = [
        torch.from_numpy(part.images.reshape(-1, 8, 8, channels).transpose(0, 3, 1, 2)) for part in (source, drawn)
    ]
    y, x = (Projection().features(part).double().numpy() for part in images)
    a, b = np.cov(y.T), np.cov(x.T)
    shared = scipy.linalg.sqrtm(a @ b).real.trace()
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + a.trace() + b.trace() - 2 * shared
    assert found["FD-projection"].value == pytest.approx(distance, rel=1e-5)
    apart = np.linalg.norm(x[:, None] - y, axis=2)
    assert found["nearest real image"].value == pytest.approx(np.median(apart.min(1)), rel=1e-5)


def test_only_distances_of_inceptions_features_are_called_fid_and_kid(projected):
    names = {}
    for distance in ("FD-projection", "FID"):
        found = measured(projected(noise_source(90), distance=distance), Samples(noise_source(60, seed=1), 8))
        names[distance] = [measure.name for measure in found.measures[:2]]
    assert names == {"FD-projection": ["FD-projection", "kernel distance"], "FID": ["FID", "KID"]}


@pytest.mark.parametrize(("value", "text"), [
    (0.12345, "0.123"), (12.345, "12.3"), (999.4, "999"), (1234.5, "1,234"), (99999, "99,999"), (-0.00001, "-1.0e-05"),
    (0, "0"),
])  # fmt: skip
def test_numbers_are_written_as_people_read_them(value, text):
    assert significant(value) == text


# What a reader should know


def test_classes_out_of_proportion_are_noted(instrument):
    few = [number for number in OTHERS if DIGITS.labels[number] not in (3, 7)]
    note = next(note for note in measured(instrument, real(few)).notes if "proportions" in note)
    assert "(20% would have to be of others; none are of 3, 7)" in note
    assert not any("proportions" in note for note in measured(instrument, noise()).notes)


def test_names_of_a_model_that_the_data_has_not_are_taken_by_number_and_this_is_noted(instrument, perfect, tmp_path):
    for number, place in enumerate(OTHERS):
        Image.fromarray(DIGITS.images[place]).save(tmp_path / f"{number:06d}.png")
    request = {"classes": list(range(10)), "class_names": [f"digit {c}" for c in range(10)]}
    (tmp_path / "request.json").write_text(json.dumps(request))
    found = measured(instrument, open_samples(tmp_path))
    assert found["accuracy"].value == perfect["accuracy"].value
    assert any("taken by their numbers" in note for note in found.notes)
    assert not any("taken by their numbers" in note for note in perfect.notes)


def test_diverged_samples_are_noted(projected, tmp_path):
    for number in range(60):
        Image.fromarray(DIGITS.images[number]).save(tmp_path / f"{number:06d}.png")
    (tmp_path / "request.json").write_text(json.dumps({"classes": None, "class_names": []}))
    (tmp_path / "report.json").write_text(json.dumps({"report": {"diverged": 4}}))
    found = measured(projected(noise_source(90)), open_samples(tmp_path))
    assert "note: 4 of the images in the folder diverged as they were drawn" in found.notes


def test_damaged_statistics_in_the_cache_are_made_anew_and_others_refused(tmp_path):
    data, said = saved(tmp_path / "a.npz", DIGITS.images[SHOWN], DIGITS.labels[SHOWN]), []
    opened = Instrument.open(data, 8, weights=CARRIED, cache=tmp_path / "cache")
    path = next((tmp_path / "cache").glob("statistics-*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        Instrument.open(data, 8, weights=CARRIED, statistics=path, cache=tmp_path / "cache")
    again = Instrument.open(data, 8, weights=CARRIED, cache=tmp_path / "cache", say=said.append)
    assert len(said) == 1
    assert "damaged, and made anew" in said[0]
    assert again.reference.moments.count == opened.reference.moments.count
    assert path.stat().st_size == len(whole)
