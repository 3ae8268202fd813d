"""From an image file to what a network takes: cropped square, resized, flipped, in [-1, 1]."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CROPS = ("center", "random")


def shrink(image: Image.Image, shorter: int) -> Image.Image:
    """Resize so that the shorter side is `shorter`: by halves with a box filter while it can, which averages areas,
    then bicubic (the down-sampling of Dhariwal and Nichol 2021)."""
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    size = max(shorter, round(image.width * scale)), max(shorter, round(image.height * scale))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def prepare(image: Image.Image, size: int, crop: str, flip: bool, generator: torch.Generator) -> Tensor:
    """The image as (C, size, size) float32 in [-1, 1].

    crop  "center", or "random": a random square of at least 0.8 of the shorter side
    flip  mirror left and right with probability 1/2

    All chance comes from `generator`; the same numbers are drawn whatever the settings.
    """
    zoom, across, down, mirror = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    if crop == "center":
        zoom, across, down = 0.0, 0.5, 0.5
    image = shrink(image, math.floor(size * (1 + zoom * 0.25)))
    left, top = round(across * (image.width - size)), round(down * (image.height - size))
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    if flip and mirror < 0.5:
        pixels = pixels[:, ::-1]
    channels_first = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.array(channels_first, np.float32)) / 127.5 - 1
