"""What samples are compared with: the real images' features, computed once and kept.

The real images are split at random into halves, A and B, so that the distance of A to B tells what no model can be
expected to fall below: the floor. Either half has the classes in the data's proportions, and so has any first part of
it, as samples have whose classes are taken in turn.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fpdm.data import BrokenImage, Source, central, pixels
from fpdm.evaluation.extractors import Extractor
from fpdm.evaluation.metrics import Moments
from fpdm.files import check_writable, wait_for, write_aside
from fpdm.keyed import generator

FORMAT = 1
MOST_FEATURES = 50_000  # single features kept, for what needs more than moments; half of each half
BATCH = 64
SAVE_EVERY = 300  # seconds between savings of what is there so far


def identity_of(source: Source, size: int, extractor: Extractor) -> dict[str, Any]:
    """All that settles reference statistics: the data, the preprocessing, and the network."""
    return {
        "format": FORMAT,
        "data": {"fingerprint": source.fingerprint, "images": len(source)},
        "preprocessing": {"size": size, "channels": source.channels, "crop": "center"},
        "features": extractor.identity,
    }


@dataclass
class Half:
    """One half of the real images: moments of all, and features (K, D) float32 of the first of them, which are the
    images of the numbers (K,) in the data set."""

    moments: Moments | None = None
    features: list[np.ndarray] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def add(self, features: np.ndarray, numbers: list[int]) -> None:
        part = Moments.of(features)
        self.moments = part if self.moments is None else self.moments.merged(part)
        room = max(0, MOST_FEATURES // 2 - len(self.numbers))
        self.features.append(features[:room].astype(np.float32))
        self.numbers += numbers[:room]

    @property
    def kept(self) -> np.ndarray:
        return np.concatenate(self.features)

    def tensors(self) -> dict[str, Tensor]:
        if self.moments is None:
            return {}
        arrays = {"mean": self.moments.mean, "scatter": self.moments.scatter, "features": self.kept}
        arrays |= {"count": np.array(self.moments.count), "numbers": np.array(self.numbers, np.int64)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Half":
        if not tensors:
            return cls()
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        moments = Moments(int(arrays["count"]), arrays["mean"], arrays["scatter"])
        return cls(moments, [arrays["features"]], arrays["numbers"].tolist())


@dataclass
class Reference:
    """Statistics of the real images.

    identity  see `identity_of`
    halves    A and B, disjoint and chosen at random
    done      images gone through, of all
    broken    how many of them could not be read
    """

    identity: dict[str, Any]
    halves: tuple[Half, Half]
    done: int = 0
    broken: int = 0

    @property
    def moments(self) -> Moments:
        """Of all images."""
        a, b = self.halves
        assert a.moments is not None
        assert b.moments is not None
        return a.moments.merged(b.moments)

    @property
    def whole(self) -> bool:
        """Whether the halves hold all images that are said to be done."""
        counts = [half.moments.count for half in self.halves if half.moments is not None]
        return sum(counts) + self.broken == self.done

    def some(self, count: int) -> np.ndarray:
        """Features (count, D) of as many images from either half, as far as there are so many."""
        a, b = (half.kept for half in self.halves)
        of_b = min(len(b), max(count // 2, count - len(a)))
        return np.concatenate([a[: count - of_b], b[:of_b]])

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{name}": tensor for i, half in enumerate(self.halves)
                   for name, tensor in half.tensors().items()}  # fmt: skip
        header = {"identity": json.dumps(self.identity), "done": str(self.done), "broken": str(self.broken)}
        write_aside(path, lambda aside: save_file(tensors, aside, header))

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Raises ValueError for a file that is damaged, or holds something else."""
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            halves = [{k[2:]: v for k, v in tensors.items() if k.startswith(f"{i}.")} for i in range(2)]
            identity, done, broken = json.loads(header["identity"]), int(header["done"]), int(header["broken"])
            if set(identity) != {"format", "data", "preprocessing", "features"}:
                raise ValueError("it does not tell what it is of")
            return cls(identity, (Half.of(halves[0]), Half.of(halves[1])), done, broken)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} holds no statistics, or is damaged: {error}. Delete it to have them made anew"
            ) from error


def reference_for(
    source: Source,
    size: int,
    extractor: Extractor,
    path: Path,
    say: Callable[[str], None] = print,
    remake: bool = False,
) -> Reference:
    """The statistics of a data set, from the file `path` if they are there, else computed and kept there. Of several
    processes that want them at once, one computes.

    remake  whether a damaged file is computed anew; else it is an error

    Raises ValueError if the file is of other data, other preprocessing or another network, naming what differs.
    """
    identity = identity_of(source, size, extractor)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; statistics are one file, such as {path / 'statistics.safetensors'}")
    if reference := kept_at(path, identity, say if remake else None):
        return reference
    check_writable(path.parent)
    with wait_for(path):
        return kept_at(path, identity, None) or made_at(path, identity, source, size, extractor, say)


def reference_in(
    cache: Path, source: Source, size: int, extractor: Extractor, say: Callable[[str], None] = print
) -> Reference:
    """The statistics of a data set, from the cache if they are there, else computed and kept there."""
    identity = json.dumps(identity_of(source, size, extractor), sort_keys=True)
    path = cache / f"statistics-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    return reference_for(source, size, extractor, path, say, remake=True)


def kept_at(path: Path, identity: dict[str, Any], say: Callable[[str], None] | None) -> Reference | None:
    """The statistics in a file, if it is there. With `say`, a damaged one is taken away, which it is told."""
    if not path.is_file():
        return None
    try:
        reference = Reference.load(path)
    except ValueError as error:
        if say is None:
            raise
        say(f"{path.name} in the cache is damaged, and made anew ({error.__cause__})")
        path.unlink(missing_ok=True)
        return None
    refuse_other(reference, identity, path)
    return reference


def made_at(
    path: Path, identity: dict[str, Any], source: Source, size: int, extractor: Extractor, say: Callable[[str], None]
) -> Reference:
    """Compute the statistics, or what is missing of them, and keep them."""
    partial = path.with_name(path.name + ".partial")
    reference = Reference(identity, (Half(), Half()))
    with suppress(ValueError):  # a damaged one is begun anew
        begun = Reference.load(partial) if partial.is_file() else reference
        if begun.identity == identity and begun.done and begun.whole:
            reference = begun
            say(f"going on with the statistics of the real images: {reference.done} of {len(source)} are done")
    try:
        compute(reference, source, size, extractor, lambda: reference.save(partial))
    except BaseException:
        if reference.whole:  # else the last one saved is the better one
            reference.save(partial)
        raise
    if reference.broken >= len(source) - 1:
        raise ValueError(
            f"{reference.broken} of {len(source)} real images cannot be read: there is nothing to compare with"
        )
    reference.save(path)
    partial.unlink(missing_ok=True)
    return reference


def compute(reference: Reference, source: Source, size: int, extractor: Extractor, save: Callable[[], None]) -> None:
    """Go through those of the real images that are not done, saving now and then."""
    first, second = halves_of(source.labels)
    order, middle, saved = first + second, len(first), time.monotonic()
    with tqdm(total=len(source), initial=reference.done, desc="real images", unit="image", leave=False) as bar:
        while reference.done < len(source):
            half, end = (0, middle) if reference.done < middle else (1, len(source))
            numbers, images = order[reference.done : min(end, reference.done + BATCH)], {}
            for number in numbers:
                with suppress(BrokenImage):
                    images[number] = pixels(central(source.load(number)[0], size))
            features = features_of(extractor, torch.stack(list(images.values()))) if images else None
            if features is not None:
                reference.halves[half].add(features, list(images))
            reference.broken += len(numbers) - len(images)
            reference.done += len(numbers)
            bar.update(len(numbers))
            if time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()


def halves_of(labels: Sequence[int] | np.ndarray) -> tuple[list[int], list[int]]:
    """The numbers of the images in halves A and B: chosen at random within each class, half of each class and half of
    all, and spread evenly by class."""
    shuffled = torch.randperm(len(labels), generator=generator("halves")).tolist()
    members: dict[int, list[int]] = {}
    for number in shuffled:
        members.setdefault(int(labels[number]), []).append(number)
    halves: tuple[list[int], list[int]] = ([], [])
    for _, numbers in sorted(members.items()):
        first = int(len(halves[0]) > len(halves[1]))
        halves[first].extend(numbers[::2])
        halves[1 - first].extend(numbers[1::2])
    a, b = (spread(half, labels) for half in halves)
    return a, b


def spread(numbers: list[int], labels: Sequence[int] | np.ndarray) -> list[int]:
    """The numbers of images in an order of which any first part has the classes in the proportions of all; within a
    class the order stays."""
    counts = Counter(int(labels[number]) for number in numbers)
    seen: Counter[int] = Counter()
    places = []
    for number in numbers:
        label = int(labels[number])
        places.append((seen[label] / counts[label], number))
        seen[label] += 1
    return [number for _, number in sorted(places, key=itemgetter(0))]


@torch.no_grad()
def features_of(extractor: Extractor, images: Tensor) -> np.ndarray:
    """Features (B, D) float32 of images (B, C, H, W) uint8, grey ones with as many channels as the network takes."""
    if images.shape[1] == 1 and 1 not in extractor.channels:
        images = images.expand(-1, 3, -1, -1)
    return extractor.features(images).float().cpu().numpy()


def refuse_other(reference: Reference, identity: dict[str, Any], path: Path) -> None:
    """Raises ValueError naming what a file of statistics is of, where that is not what it should be."""
    if reference.identity == identity:
        return
    wrong = [
        f"{part} {name} is {reference.identity[part].get(name)!r}, not {identity[part].get(name)!r}"
        for part in ("data", "preprocessing", "features")
        for name in sorted({*reference.identity[part], *identity[part]})
        if reference.identity[part].get(name) != identity[part].get(name)
    ]
    raise ValueError(
        f"the statistics in {path} are of something else: {'; '.join(wrong) or 'an older format'}. "
        "Name another file, or none"
    )
