"""Sets of samples: folders of images and `.npz` files, from this package or any other."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fpdm.data import ArraySource, BrokenImage, ImageFolder, npz_file, pixels, read_image
from fpdm.drawing import cycled, image_file
from fpdm.files import read_json

LEAST = 50  # images; of fewer, no metric here says anything


@dataclass(frozen=True)
class Samples:
    """Generated images, all square and of one size.

    source  what loads them
    size    side in pixels
    """

    source: Any
    size: int

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int, channels: int) -> Tensor:
        """One image (channels, size, size) uint8. Raises ValueError for colours where `channels` is 1."""
        image = pixels(self.source.load(index)[0])
        if len(image) == channels:
            return image
        if not is_grey(image):
            raise ValueError(f"the samples are in colour (number {index} is) and the real images are grey")
        return image[:1].expand(channels, -1, -1)

    @cached_property
    def channels(self) -> int:
        """1 where all images are grey, however they are stored, else 3."""
        return 1 if self.coloured is None else 3

    @cached_property
    def coloured(self) -> int | None:
        """The number of the first image in colour; None where all are grey."""
        return next((i for i in range(len(self)) if not is_grey(pixels(self.source.load(i)[0]))), None)

    @property
    def diverged(self) -> int:
        """How many are known to have diverged as they were drawn."""
        return self.source.diverged if isinstance(self.source, DrawnFolder) else 0

    def labels(self, class_names: list[str]) -> list[int] | None:
        """The class that each was asked for, as a number of the data's classes `class_names`. None if that is not
        known, or the classes are others.

        Files of arrays have numbers, folders have names; folders named by numbers may mean either. Names of a model are
        numbers where the data has nothing but numbers, and as many of them: those of IDX files and arrays.
        """
        names: list[str] = self.source.class_names
        if not names or not class_names:
            return None
        if isinstance(self.source, ArraySource):
            return [int(label) for label in self.source.labels] if len(names) <= len(class_names) else None
        if set(names) <= set(class_names):
            return [class_names.index(names[int(label)]) for label in self.source.labels]
        by_name = isinstance(self.source, DrawnFolder) and self.source.named
        numbered = len(names) == len(class_names) and all(name == str(i) for i, name in enumerate(class_names))
        if by_name and numbered and not any(name.isdecimal() for name in names):
            return list(self.source.labels)
        if not by_name and all(name.isdecimal() and int(name) < len(class_names) for name in names):
            return [int(names[int(label)]) for label in self.source.labels]
        return None

    def batches(self, channels: int, size: int) -> Iterator[Tensor]:
        """Parts (B, channels, size, size) of all images, in order."""
        for start in range(0, len(self), size):
            yield torch.stack([self.load(i, channels) for i in range(start, min(len(self), start + size))])


def is_grey(image: Tensor) -> bool:
    """Whether all channels of an image (C, H, W) are equal."""
    return bool((image == image[:1]).all())


class DrawnFolder:
    """What `draw_missing` leaves: numbered images, and a request that tells their classes."""

    def __init__(self, path: Path, count: int | None = None):
        request = read_json(path / "request.json")
        numbers = sorted(int(file.stem) for file in path.glob("*.png") if file.stem.isdecimal())[:count]
        self.files = [image_file(path, number) for number in numbers]
        self.class_names: list[str] = []
        self.labels = [0] * len(numbers)
        self.named = bool(request["class_names"])
        report = path / "report.json"
        self.diverged = diverged_in(report) if report.is_file() else 0
        if request["classes"]:
            self.class_names = request["class_names"] or list(map(str, range(max(request["classes"]) + 1)))
            classes = cycled(request["classes"], max(numbers, default=-1) + 1) or []
            self.labels = [classes[number] for number in numbers]

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.files[index], self.files[index].name), self.labels[index]


def diverged_in(report: Path) -> int:
    """How many images a report says have diverged. Raises ValueError for a file that is no report."""
    try:
        return int(read_json(report)["report"]["diverged"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{report} is no report of fpdm, or damaged: move it elsewhere, or remove it") from error


def is_drawn(folder: Path) -> bool:
    """Whether a folder is of `draw_missing`. Raises ValueError for a request.json that is not its."""
    path = folder / "request.json"
    if not path.is_file():
        return False
    request = read_json(path)
    if not isinstance(request, dict) or not {"classes", "class_names"} <= set(request):
        raise ValueError(f"{path} is not one that `fpdm sample` writes: it names no classes. Take it out")
    return True


def folder_of(path: Path, count: int | None) -> Any:
    return DrawnFolder(path, count) if is_drawn(path) else ImageFolder(path)


def open_samples(place: str | Path, count: int | None = None) -> Samples:
    """The samples in a folder or `.npz` file, or the first `count` in a folder of `draw_missing`. Every image is looked
    at once.

    Raises ValueError if there are too few, if one cannot be read, or if they are not square and of one size.
    """
    path = Path(place)
    if not path.exists():
        raise ValueError(f"there are no samples {place}: name a folder of images, an .npz file, or a model")
    if path.is_file() and path.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"{place} is one image: name a folder of images, an .npz file, or a model")
    source: Any = npz_file(path) if path.is_file() else folder_of(path, count)
    if len(source) < LEAST:
        raise ValueError(f"{place} holds {len(source)} images: too few to measure anything by. Draw {LEAST} or more")
    return Samples(source, one_size(source, place))


def one_size(source: Any, place: str | Path) -> int:
    """The side of the images. Raises ValueError naming the first that is broken, not square, or of another size."""
    size = None
    for index in range(len(source)):
        name = Path(source.files[index]).name if hasattr(source, "files") else f"image {index}"
        name = source.names[index] if hasattr(source, "names") else name
        try:
            width, height = source.load(index)[0].size
        except BrokenImage as error:
            raise ValueError(f"a sample in {place} cannot be read: {error}. Draw it again, or take it out") from error
        size = width if size is None else size
        if (width, height) != (size, size):
            raise ValueError(
                f"{name} in {place} is {width} x {height}; samples must be square and of one size, and others are "
                f"{size} x {size}"
                if (width == height)
                else f"{name} in {place} is {width} x {height}, not square"
            )
    assert size is not None
    return size
