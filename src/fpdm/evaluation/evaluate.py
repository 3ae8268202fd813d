"""The instrument: real images, a network to see them by, and what is measured of samples against them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tqdm import tqdm

from fpdm.data import ArraySource, Source, open_images
from fpdm.evaluation.extractors import Classifier, Extractor, make_extractor
from fpdm.evaluation.metrics import (
    Frechet,
    Moments,
    bootstrap_interval,
    dealt,
    error_without,
    jackknife_error,
    kernel_distance,
    manifolds,
    proportion_interval,
)
from fpdm.evaluation.originals import Originals
from fpdm.evaluation.reference import BATCH, Reference, features_of, identity_of, reference_for, reference_in, spread
from fpdm.evaluation.result import Evaluation, Measure
from fpdm.evaluation.samples import LEAST, Samples
from fpdm.files import check_writable
from fpdm.keyed import seed_of

PAIRS = 10_000  # most images of either kind where all pairs are compared
GROUPS = 25  # that the jackknife leaves out in turn: its error is then known to about 15%
FLOORS = 4  # sets of real images that the floor is the mean of, where there are so many
APART = 0.05  # of the samples may be of other classes than the data's proportions ask for


@dataclass(frozen=True, eq=False)
class Instrument:
    """Measures samples of `size` x `size` pixels against real images."""

    name: str
    source: Source
    size: int
    extractor: Extractor
    reference: Reference
    originals: Originals
    split: str = "train"

    @classmethod
    def open(
        cls,
        data: str,
        size: int,
        *,
        channels: int | None = None,
        coloured: int | None = None,
        split: str = "train",
        features: str | None = None,
        weights: str | None = None,
        statistics: str | Path | None = None,
        copies_of: str | None = None,
        cache: Path,
        device: str = "cpu",
        say: Callable[[str], None] = print,
    ) -> Self:
        """Open the real images and the network, and have the statistics: read, or computed and kept.

        data        see `open_images`
        channels    of the samples, as which image files are read: 1 (grey) or 3 (RGB); None reads RGB, and leaves it to
                    `measure` to refuse samples in colour where the real images are grey
        coloured    the number of a sample in colour, to be named where that is refused
        features    name of an extractor; None takes the classifier for tiny grey images with classes, else
                    EfficientNet-Lite0
        statistics  file of the real images' statistics; None for one in `cache`
        copies_of   images that samples may be copies of, such as those that a model was trained on, if the real images
                    are others; of data in parts, those to train on; see `open_images`

        Raises ValueError for what is unknown, missing, or does not fit together; ImportError for a missing package.
        """
        read_as = channels or 3
        source = opened(data, read_as, split, size)
        if channels == 3 and source.channels == 1:
            first = "" if coloured is None else f" (number {coloured} is)"
            raise ValueError(f"the samples are in colour{first} and the real images in {data} are grey: name others")
        others = None if copies_of is None else opened(copies_of, source.channels, "train", size)
        if others is not None and others.channels != source.channels:
            kinds = {1: "grey", 3: "in colour"}
            raise ValueError(
                f"the images of {copies_of} are {kinds[others.channels]}, those of {data} {kinds[source.channels]}: "
                "they cannot be seen in the same way"
            )
        features = features or default_features(source, size)
        path = None if statistics is None else Path(statistics)
        if path is not None and not path.is_file():
            check_writable(path.parent)
        learns = features == "classifier" and weights is None and split != "train"
        learned_from = to_learn_from(data, read_as, split, size) if learns else source
        extractor = make_extractor(features, weights, device, learned_from, size, cache)
        if path is None:
            reference = reference_in(cache, source, size, extractor, say)
        else:
            reference = reference_for(source, size, extractor, path, say)
        check_count(len(source) - reference.broken, data)
        name = data if split == "train" else f"{data} ({split})"
        originals = Originals(name, source, reference)
        if copies_of is not None and others is not None:
            same = identity_of(others, size, extractor) == reference.identity
            searched = reference if same else reference_in(cache, others, size, extractor, say)
            check_count(len(others) - searched.broken, copies_of)
            originals = Originals(copies_of, others, searched)
        return cls(name, source, size, extractor, reference, originals, split)

    def measure(self, samples: Samples, picture: Path | None = None, progress: bool = True) -> Evaluation:
        """All metrics of the samples. With `picture`, the samples that are nearest to a real image are drawn there,
        each above it.

        Raises ValueError for samples of another size, or in colour where the real images are grey.
        """
        if samples.size != self.size:
            raise ValueError(f"the samples are {samples.size} x {samples.size}, not {self.size} x {self.size}")
        labels = samples.labels(self.source.class_names)
        # Sets may be sorted by class, and not all metrics use all samples.
        order = spread(
            rng_for("order").permutation(len(samples)).tolist(), [0] * len(samples) if labels is None else labels
        )
        x = self.features(samples, progress)[order]
        labels = None if labels is None else [labels[number] for number in order]
        strata = strata_of(labels)
        measures = [self.frechet(x, strata), self.kernel(x, strata), *self.neighbourhoods(x)]
        if isinstance(self.extractor, Classifier) and labels is not None:
            measures.append(self.accuracy(x, np.array(labels)))
        near, distances, numbers = self.originals.nearest(x)
        measures += near
        if picture is not None:
            self.originals.draw(samples, order, distances, numbers, picture)
        return Evaluation(
            samples=len(x),
            compared=self.compared(x),
            floor=self.floor_counts(x),
            halves=self.halves,
            real={"name": self.name, "images": self.reference.moments.count, "broken": self.reference.broken},
            identity=self.reference.identity,
            measures=tuple(measures),
            originals=None if self.originals.source is self.source else self.originals.to_dict(),
            notes=tuple(self.notes(x, labels, samples)),
        )

    def notes(self, x: np.ndarray, labels: list[int] | None, samples: Samples) -> Iterator[str]:
        """What a reader should know, of samples of features x (n, D)."""
        if samples.diverged:
            yield f"note: {samples.diverged} of the images in the folder diverged as they were drawn"
        if self.source.channels == 1 and not isinstance(self.source, ArraySource):  # whose images are not converted
            yield "note: all samples are grey, so the real images were read in grey, too: colours are not measured"
        names = samples.source.class_names
        if labels is None and self.source.class_names and names:
            yield "note: the classes of the samples are not those of the real images, and left out of account"
        if labels is not None and not all(name in self.source.class_names or name.isdecimal() for name in names):
            yield "note: the classes of the real images have no names: those of the samples are taken by their numbers"
        if labels is not None and (note := disproportion(labels, self.source)):
            yield note
        if len(x) > self.floor_counts(x)[0]:
            yield (
                f"note: the floor of the {self.extractor.distance} is of fewer images than there are samples, which "
                "biases it upwards; that of the kernel distance is not biased"
            )
        if len(x) < x.shape[1]:
            yield (
                f"note: {len(x)} samples for {x.shape[1]} features: the distance is far above that of many samples, "
                "and to be compared at this number only"
            )
        if self.originals.source is not self.source:
            yield self.originals.note
        elif self.split != "train":
            yield (
                f"note: copies are looked for among the {self.split} images only, and not among those to train on "
                "(`fpdm evaluate --copies-of`)"
            )
        if self.reference.broken:
            yield f"note: {self.reference.broken} real images could not be read and were left out"

    def features(self, samples: Samples, progress: bool = True) -> np.ndarray:
        """(n, D) float64."""
        parts = []
        with tqdm(total=len(samples), desc="samples", unit="image", leave=False, disable=not progress) as bar:
            for images in samples.batches(self.source.channels, BATCH):
                parts.append(features_of(self.extractor, images))
                bar.update(len(images))
        return np.concatenate(parts).astype(np.float64)

    def moments(self, half: int) -> Moments:
        moments = self.reference.halves[half].moments
        assert moments is not None
        return moments

    @cached_property
    def kept(self) -> tuple[np.ndarray, np.ndarray]:
        """The single features of either half (K, D), float64."""
        a, b = (half.kept.astype(np.float64) for half in self.reference.halves)
        return a, b

    @cached_property
    def halves(self) -> float:
        """The Frechet distance between two halves of the real images."""
        return Frechet(self.moments(1))(self.moments(0))

    @cached_property
    def floors(self) -> dict[tuple[str, int], Any]:
        """What real images are to each other, by metric and number of samples: the same for all samples."""
        return {}

    def floor(self, name: str, count: int, compute: Callable[[], Any]) -> Any:
        if (name, count) not in self.floors:
            self.floors[name, count] = compute()
        return self.floors[name, count]

    @cached_property
    def distance(self) -> Frechet:
        """To all real images."""
        return Frechet(self.reference.moments)

    def classes(self, half: int) -> np.ndarray:
        """The classes (K,) of the images whose features are kept."""
        return np.asarray(self.source.labels)[self.reference.halves[half].numbers]

    def blocks(self, x: np.ndarray, classes: bool = True) -> list[np.ndarray]:
        """Sets of as many real images as there are samples, or of half of them, disjoint, at most 4. Each has the
        classes in proportion, being a run of images of one half; without `classes`, as chance would have them."""
        runs = []
        for half in range(2):
            kept = self.kept[half]
            if not classes:
                kept = kept[rng_for("blocks").permutation(len(kept))]
            size = min(len(x), len(kept))
            runs += [kept[start : start + size] for start in range(0, len(kept) - size + 1, size)]
        return runs[:FLOORS]

    def floor_counts(self, x: np.ndarray) -> tuple[int, int]:
        count = len(self.blocks(x)[0])
        return count, self.reference.moments.count - count

    def frechet(self, x: np.ndarray, strata: np.ndarray | None) -> Measure:
        whole, value = self.reference.moments, self.distance(Moments.of(x))
        margin = 1.96 * jackknife_error(self.distance, x, dealt(len(x), GROUPS, rng_for("frechet"), strata))

        def real() -> float:
            parts = [Moments.of(block) for block in self.blocks(x, classes)]
            return float(np.mean([Frechet(whole.without(part))(part) for part in parts]))

        # A perfect model that is not asked for classes draws them by chance, which is farther from the data.
        classes = strata is not None or not self.source.class_names
        floor = self.floor("frechet" if classes else "frechet of any classes", len(x), real)
        return Measure(self.extractor.distance, value, max(0.0, value - margin), value + margin, floor, "lower")

    def kernel(self, x: np.ndarray, strata: np.ndarray | None) -> Measure:
        (a, b), half = (kept[: PAIRS // 2] for kept in self.kept), PAIRS // 2
        of_a, of_b = self.classes(0)[:half], self.classes(1)[:half]
        of_x = None if strata is None else strata[:PAIRS]
        value, error = kernel_distance(
            x[:PAIRS], np.concatenate([a, b]), paired(of_x), paired(np.concatenate([of_a, of_b]))
        )
        real = self.floor("kernel", 0, lambda: kernel_distance(a, b, paired(of_a), paired(of_b)))
        name = "KID" if self.extractor.distance == "FID" else "kernel distance"
        low, high = value - 1.96 * error, value + 1.96 * error
        return Measure(name, value, low, high, real.value, "lower", 1.96 * real.standard_error)

    def compared(self, x: np.ndarray) -> int:
        """How many samples are compared with as many real images, pair by pair, and as many of those with others."""
        return min(len(x), PAIRS, *(len(half.numbers) for half in self.reference.halves))

    def neighbourhoods(self, x: np.ndarray) -> list[Measure]:
        count = self.compared(x)
        groups = dealt(count, GROUPS, rng_for("neighbourhoods"))
        found = manifolds(x[:count], self.reference.some(count).astype(np.float64), groups=groups)
        a, b = self.kept
        real = self.floor("neighbourhoods", count, lambda: manifolds(a[:count], b[:count]))
        intervals = {
            "precision": proportion_interval(found.precision),
            "recall": without_interval(found.recall, found.without[:, 0]),
            "density": mean_interval(found.density, "density"),
            "coverage": without_interval(found.coverage, found.without[:, 1]),
        }
        return [
            Measure(name, float(getattr(found, name).mean()), *interval, float(getattr(real, name).mean()), "higher")
            for name, interval in intervals.items()
        ]

    def accuracy(self, x: np.ndarray, labels: np.ndarray) -> Measure:
        """Samples that the classifier finds to be of the class asked for; as floor, its accuracy on real images that
        it was not trained on."""
        assert isinstance(self.extractor, Classifier)
        named = self.extractor.classify(torch.from_numpy(x).float()).cpu().numpy()
        right = (named == labels).astype(np.float64)
        floor = self.extractor.accuracy
        return Measure("accuracy", float(right.mean()), *proportion_interval(right), floor, "higher")


def opened(data: str, channels: int, split: str, size: int) -> Source:
    """A data set of which there are enough images, as far as can be told before they are read."""
    source = open_images(data, channels, split, size=size)
    check_count(len(source), data)
    return source


def to_learn_from(data: str, channels: int, split: str, size: int) -> Source:
    """The images that the classifier learns from where those of another part are measured: those to train on."""
    try:
        return open_images(data, channels, size=size)
    except ValueError as error:
        raise ValueError(
            f"the split {split!r} is measured, and its classifier learns from 'train': {error}. Give it weights "
            "(--weights), or see by another network (--features)"
        ) from error


def check_count(count: int, data: str) -> None:
    if count < LEAST:
        raise ValueError(f"{data} has {count} images that can be read: too few to compare with. Take {LEAST} or more")


def default_features(source: Source, size: int) -> str:
    tiny = source.channels == 1 and size <= 32 and len(source.class_names) > 1
    return "classifier" if tiny else "efficientnet-lite0"


def mean_interval(values: np.ndarray, name: str) -> tuple[float, float]:
    return bootstrap_interval(lambda v: float(v.mean()), values, rng_for(name))


def without_interval(values: np.ndarray, without: np.ndarray) -> tuple[float, float]:
    """Of the mean of values (m,) of 0 and 1 over real images, from its values (G,) without a group of the samples."""
    value, error = float(values.mean()), error_without(without)
    if error == 0:
        return proportion_interval(values)
    return max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error)


def disproportion(labels: list[int], source: Source) -> str | None:
    """A note, where the classes of the samples are not in the proportions of the real images."""
    count = len(source.class_names)
    drawn = np.bincount(labels, minlength=count) / len(labels)
    real = np.bincount(np.asarray(source.labels), minlength=count) / len(source)
    apart = float(np.abs(drawn - real).sum() / 2)
    if apart <= APART:
        return None
    lacking = [source.class_names[c] for c in range(count) if real[c] and not drawn[c]]
    which = f"; none are of {', '.join(lacking[:5])}{' and others' * (len(lacking) > 5)}" if lacking else ""
    return (
        f"note: the classes of the samples are not in the proportions of the real images ({apart:.0%} would have to be "
        f"of others{which}), which all numbers but the accuracy count as a fault of the samples"
    )


def strata_of(labels: list[int] | None) -> np.ndarray | None:
    """The labels (n,), if the classes were taken in turn, so that there are as many of each; else None."""
    if labels is None:
        return None
    counts = np.unique(labels, return_counts=True)[1]
    return np.array(labels) if counts.max() - counts.min() <= 1 else None


def paired(labels: np.ndarray | None) -> np.ndarray | None:
    """The labels, if there are two images of a class; else the classes cannot be taken into account."""
    return None if labels is None or np.unique(labels, return_counts=True)[1].max() < 2 else labels


def rng_for(name: str) -> np.random.Generator:
    return np.random.default_rng(seed_of("bootstrap", name))
