"""From an image file to what a network takes: cropped square, resized, flipped, in [-1, 1]."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CROPS = ("center", "random")


def resize(image: Image.Image, size: int) -> Image.Image:
    """A square image at another size: by halves with a box filter while it can, which averages areas, then bicubic (the
    down-sampling of Dhariwal and Nichol 2021)."""
    while image.width >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image if image.width == size else image.resize((size, size), Image.Resampling.BICUBIC)


def prepare(image: Image.Image, size: int, crop: str, flip: bool, generator: torch.Generator) -> Tensor:
    """The image as (C, size, size) float32 in [-1, 1].

    crop  "center": the largest square in the middle; "random": a square anywhere, at least 0.8 of the shorter side
    flip  mirror left and right with probability 1/2

    All chance comes from `generator`; the same numbers are drawn whatever the settings.
    """
    zoom, across, down, mirror = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    if crop == "center":
        zoom, across, down = 0.0, 0.5, 0.5
    side = math.ceil(min(image.size) * (1 - 0.2 * zoom))
    left, top = round(across * (image.width - side)), round(down * (image.height - side))
    # Cropped first: a long strip would be resized to far more than is used.
    square = resize(image.crop((left, top, left + side, top + side)), size)
    return pixels(square, mirrored=flip and mirror < 0.5).float() / 127.5 - 1


@dataclass(frozen=True)
class ImagePreparation:
    """`prepare` with its settings, for a `Stream`."""

    size: int
    crop: str = "center"
    flip: bool = False

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        return prepare(image, self.size, self.crop, self.flip, generator)


def central(image: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle, resized: what `prepare` makes of an image with crop "center" and no flip."""
    side = min(image.size)
    left, top = round(0.5 * (image.width - side)), round(0.5 * (image.height - side))
    return resize(image.crop((left, top, left + side, top + side)), size)


def image_of(tensor: Tensor) -> Image.Image:
    """The image of (C, H, W) uint8, C being 1 or 3: `pixels` undone."""
    array = tensor.numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def pixels(image: Image.Image, mirrored: bool = False) -> Tensor:
    """The image as (C, H, W) uint8."""
    array = np.asarray(image)
    if mirrored:
        array = array[:, ::-1]
    return torch.from_numpy(np.array(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)))
