"""Sources of images and labels, and the keyed stream that training reads."""

from fpdm.data.arrays import ArraySource, digits, idx_folder, npz_file, write_npz
from fpdm.data.hub import HubImages, hub_images
from fpdm.data.latents import Autoencoder, Latent, LatentFolder, LatentPreparation, holds_latents
from fpdm.data.open import KINDS, open_images
from fpdm.data.shards import Shards
from fpdm.data.sources import BrokenImage, ImageFolder, Source, read_image
from fpdm.data.stream import Batch, Slots, Stream, begun, loader
from fpdm.data.transforms import CROPS, ImagePreparation, central, image_of, pixels, prepare

__all__ = [
    "CROPS",
    "KINDS",
    "ArraySource",
    "Autoencoder",
    "Batch",
    "BrokenImage",
    "HubImages",
    "ImageFolder",
    "ImagePreparation",
    "Latent",
    "LatentFolder",
    "LatentPreparation",
    "Shards",
    "Slots",
    "Source",
    "Stream",
    "begun",
    "central",
    "digits",
    "holds_latents",
    "hub_images",
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
