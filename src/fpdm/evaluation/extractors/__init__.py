"""Networks whose features images are compared by. To add one: a class like `EfficientNetLite0`, and a line below."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fpdm.data import Source
from fpdm.evaluation.extractors.classifier import Classifier
from fpdm.evaluation.extractors.dinov2 import DINOv2
from fpdm.evaluation.extractors.efficientnet import EfficientNetLite0
from fpdm.evaluation.extractors.inception import Inception
from fpdm.names import unknown


class Extractor(Protocol):
    """A network that turns images into features.

    name      on the command line
    distance  what the Frechet distance of its features is called
    device    where it computes
    channels  1 or 3: what it takes; grey images are handed to an RGB network with equal channels
    identity  all that settles its features: weights, preprocessing. Statistics of another identity are refused
    """

    name: str
    distance: str
    device: str
    channels: tuple[Any, ...]
    identity: dict[str, Any]

    def features(self, images: Tensor) -> Tensor:
        """Features (B, D) float32 of images (B, C, H, W) uint8."""


EXTRACTORS: dict[str, Callable[[str | None, str], Extractor]] = {
    "efficientnet-lite0": EfficientNetLite0,
    "inception": Inception,
    "dinov2": DINOv2,
}


def make_extractor(name: str, weights: str | None, device: str, source: Source, size: int, cache: Path) -> Extractor:
    """The extractor of a name.

    weights       a file or folder of weights, or a name on the hub; None for the extractor's own
    source, size  the real images, on which a classifier is trained
    cache         folder in which such a classifier is kept

    Raises ValueError for an unknown name or weights that do not fit, ImportError if a package is missing.
    """
    if name == Classifier.name:
        return Classifier.for_data(source, size, weights, device, cache)
    if name not in EXTRACTORS:
        raise ValueError(unknown("feature extractor", name, (Classifier.name, *EXTRACTORS)))
    return EXTRACTORS[name](weights, device)


__all__ = ["EXTRACTORS", "Classifier", "DINOv2", "EfficientNetLite0", "Extractor", "Inception", "make_extractor"]
