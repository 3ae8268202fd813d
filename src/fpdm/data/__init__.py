"""Sources of images and labels, and the keyed stream that training reads."""

from fpdm.data.arrays import ArraySource, digits, idx_folder, npz_file, write_npz
from fpdm.data.sources import BrokenImage, ImageFolder, Source, open_images, read_image
from fpdm.data.stream import Batch, Slots, Stream, loader
from fpdm.data.transforms import CROPS, ImagePreparation, central, image_of, pixels, prepare

__all__ = [
    "CROPS",
    "ArraySource",
    "Batch",
    "BrokenImage",
    "ImageFolder",
    "ImagePreparation",
    "Slots",
    "Source",
    "Stream",
    "central",
    "digits",
    "idx_folder",
    "image_of",
    "loader",
    "npz_file",
    "open_images",
    "pixels",
    "prepare",
    "read_image",
    "write_npz",
]
