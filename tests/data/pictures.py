"""Small images whose pixels tell their number, as bytes of image files; and what processes make of a stream."""

import io

import numpy as np
from PIL import Image

from fpdm.data import Slots, loader


def pixels_of(number: int) -> np.ndarray:
    """(4, 3, 3) uint8, other for each number below 65,536."""
    array = np.arange(36, dtype=np.uint8).reshape(4, 3, 3)
    array[0, 0] = number % 256, number // 256, 7
    return array


def picture(number: int, suffix: str = "PNG", **options: object) -> bytes:
    """The image `number` as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels_of(number)).save(file, suffix, **options)
    return file.getvalue()


def number_of(image: Image.Image) -> int:
    """Which image this is; fails if any pixel is another."""
    array = np.asarray(image)
    number = int(array[0, 0, 0]) + 256 * int(array[0, 0, 1])
    assert np.array_equal(array, pixels_of(number))
    return number


def gather(stream, ranks=1, workers=0, first=0, last=5):
    """(step, slot) -> (image, label) of all processes together, in batches of six."""
    found = {}
    for rank in range(ranks):
        for batch in loader(stream, Slots(first, last, 6, 1, rank, ranks), workers, pin_memory=False):
            assert (batch.broken, batch.failure) == ([], None)
            for slot, image, label in zip(batch.slots, batch.images, batch.labels, strict=True):
                found[batch.step, slot] = (image, int(label))
    return found
