"""What stands in for networks and for data where only the bookkeeping is tested."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fpdm.data import ArraySource, BrokenImage

FEATURES = 6


class Projection:
    """Pixels through one fixed random map: linear, so that every number can be computed by hand.

    weights  which map
    stop     the call of `features` in which `error` is raised, counted from 1; None for none
    seen     images that features were computed of
    """

    name, distance, device = "projection", "FD-projection", "cpu"

    def __init__(
        self,
        weights: str = "a",
        channels: tuple[int, ...] = (1, 3),
        stop: int | None = None,
        error: type[BaseException] = KeyboardInterrupt,
    ):
        self.identity: dict[str, Any] = {"network": self.name, "weights": weights}
        self.channels, self.stop, self.error = channels, stop, error
        self.calls = self.seen = 0

    def features(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            raise self.error
        assert images.shape[1] in self.channels
        assert images.dtype == torch.uint8
        self.seen += len(images)
        flat = images.flatten(1).double() / 255
        seed = sum(map(ord, self.identity["weights"]))
        matrix = np.random.default_rng(seed).standard_normal((flat.shape[1], FEATURES))
        return (flat @ torch.from_numpy(matrix)).float()


class Spoilt(ArraySource):
    """Images of which some cannot be read."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: list[str], broken: set[int]):
        super().__init__(images, labels, class_names)
        self.broken = broken

    def load(self, index: int) -> tuple[Image.Image, int]:
        if index in self.broken:
            raise BrokenImage(f"{index}.png: cannot be read")
        return super().load(index)


def noise_source(
    count: int, *, size: int = 8, channels: int = 1, classes: int = 3, seed: int = 0, broken: set[int] | None = None
) -> Spoilt:
    """Random images of classes that are taken in turn."""
    shape = (count, size, size) if channels == 1 else (count, size, size, channels)
    images = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    labels = np.arange(count) % classes
    return Spoilt(images, labels, [str(c) for c in range(classes)], broken or set())
