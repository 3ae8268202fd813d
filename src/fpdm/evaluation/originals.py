"""Copies: whether samples repeat images that a model could know by heart, and a picture of the nearest."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fpdm.data import Source, central, image_of
from fpdm.evaluation.metrics import bootstrap_interval, nearest, proportion_interval
from fpdm.evaluation.reference import Reference
from fpdm.evaluation.result import Measure
from fpdm.evaluation.samples import Samples
from fpdm.files import write_aside
from fpdm.imaging import grid
from fpdm.keyed import seed_of

MOST = 10_000  # samples whose nearest image is looked for
SAME = 1e-3  # of the usual distance: nearer to each other is the same image, its features rounded in other batches
NEAR = 0.01  # of the real images are so near to another that a sample as near to one counts as a copy of it
SHOWN = 10  # pairs in the picture of nearest neighbours


@dataclass(frozen=True, eq=False)
class Originals:
    """Real images that samples may be copies of, as far as their features are kept."""

    name: str
    source: Source
    reference: Reference

    @property
    def features(self) -> np.ndarray:
        """(K, D) float64."""
        return np.concatenate([half.kept for half in self.reference.halves]).astype(np.float64)

    @cached_property
    def numbers(self) -> np.ndarray:
        """The numbers (K,) of these images in their data set."""
        a, b = self.reference.halves
        return np.array(a.numbers + b.numbers)

    @cached_property
    def apart(self) -> np.ndarray:
        """Distances of the first of them to the nearest other one."""
        features = self.features
        return nearest(features[:MOST], features, skip_own=True)[0]

    def to_dict(self) -> dict[str, Any]:
        """What they are, for a result."""
        counts = {"images": len(self.source), "searched": len(self.numbers), "broken": self.reference.broken}
        return {"name": self.name, "fingerprint": self.source.fingerprint, **counts}

    @property
    def note(self) -> str:
        broken = f", of which {self.reference.broken:,} could not be read" if self.reference.broken else ""
        searched = f"{len(self.numbers):,} of the {len(self.source):,} images of {self.name}{broken}"
        return f"note: copies are looked for among {searched}; the nearest are theirs, too"

    def nearest(self, x: np.ndarray) -> tuple[list[Measure], np.ndarray, np.ndarray]:
        """Of samples of features x (n, D), the median distance to the nearest of the images, and the share that is as
        near to one as the nearest 1% of different images are to another: copies raise the share, when they are few, and
        lower the distance, when they are many. The floors are of the images themselves. Distances (n,) and, for each
        sample, the number of that image in the data set (n,)."""
        distances, places = nearest(x[:MOST], self.features)
        own, rng = self.apart, np.random.default_rng(seed_of("bootstrap", "nearest"))
        value = float(np.median(distances))
        low, high = bootstrap_interval(lambda d: float(np.median(d)), distances, rng)
        near = Measure("nearest real image", value, low, high, float(np.median(own)), "floor")
        # Images that are there twice are no reason to let copies pass.
        different = own[own > SAME * np.median(own)]
        limit = np.quantile(different, NEAR) if len(different) else 0.0
        copied, twins = ((values <= limit).astype(np.float64) for values in (distances, own))
        copies = Measure(
            "near copies", float(copied.mean()), *proportion_interval(copied), float(twins.mean()), "lower"
        )
        return [near, copies], distances, self.numbers[places]

    def draw(self, samples: Samples, order: list[int], distances: np.ndarray, numbers: np.ndarray, path: Path) -> None:
        """A picture: the samples that are nearest to an image, and below them those images."""
        closest = np.argsort(distances)[:SHOWN]
        upper = [image_of(samples.load(order[i], self.source.channels)) for i in closest]
        lower: list[Image.Image] = [central(self.source.load(int(numbers[i]))[0], samples.size) for i in closest]
        write_aside(path, lambda aside: grid(upper + lower, columns=len(upper)).save(aside, format="PNG"))
