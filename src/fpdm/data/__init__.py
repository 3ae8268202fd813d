"""Sources of images and labels, and the keyed stream that training reads."""

from fpdm.data.sources import ArraySource, BrokenImage, ImageFolder, Source, digits, idx_folder
from fpdm.data.stream import Batch, Slots, Stream, loader
from fpdm.data.transforms import CROPS, prepare

__all__ = [
    "CROPS",
    "ArraySource",
    "Batch",
    "BrokenImage",
    "ImageFolder",
    "Slots",
    "Source",
    "Stream",
    "digits",
    "idx_folder",
    "loader",
    "prepare",
]
