"""Where images come from. A source is indexable, has classes or none, and tells a fingerprint of what it holds."""

import gzip
import hashlib
import os
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = {"train", "test", "val", "valid", "validation"}


class BrokenImage(Exception):
    """An image that cannot be read; its text names the file and the reason."""


class Source(Protocol):
    """Images with or without classes.

    class_names  one per class; none for images without classes
    channels     1 (grey) or 3 (RGB) of every image that `load` returns
    fingerprint  changes with the data, not when it is moved: of arrays the contents, of folders the names and sizes
    """

    class_names: list[str]
    channels: int
    fingerprint: str

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image and its label (0 without classes). Raises BrokenImage if it cannot be read."""


class ArraySource:
    """Grey images (N, H, W) uint8 and labels (N,) in memory."""

    channels = 1

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: list[str]):
        self.images, self.labels, self.class_names = images, labels, class_names
        digest = hashlib.sha256(repr(images.shape).encode())
        digest.update(np.ascontiguousarray(images).data)
        digest.update(np.ascontiguousarray(labels).data)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def digits() -> ArraySource:
    """The 1,797 handwritten digits, 8 x 8 grey, that the package carries (UCI, CC BY 4.0)."""
    with (files("fpdm.data") / "digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as data:
        sixteenths, labels = data["images"], data["labels"]
    images = np.round(sixteenths * (255 / 16)).astype(np.uint8)
    return ArraySource(images, labels, [str(digit) for digit in range(10)])


def idx_folder(path: str | Path) -> ArraySource:
    """The images of the MNIST family in `path`: `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, or `.gz`.

    Raises ValueError if they are not there or damaged.
    """
    folder = Path(path)
    images, labels = (read_idx(_idx_file(folder, part)) for part in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: images of shape {images.shape} and labels of shape {labels.shape} do not go together"
        )
    return ArraySource(images, labels, [str(label) for label in range(int(labels.max()) + 1)])


def _idx_file(folder: Path, part: str) -> Path:
    for name in (f"train-{part}-ubyte", f"train-{part}-ubyte.gz"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    raise ValueError(f"{folder} holds no train-{part}-ubyte or train-{part}-ubyte.gz; found: {found}")


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file of unsigned bytes. Raises ValueError if the file is damaged."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of bytes: it begins with {raw[:4].hex()}")
    dims = raw[3]
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    body = np.frombuffer(raw, np.uint8, offset=min(len(raw), 4 + 4 * dims))
    if body.size != np.prod(shape, dtype=np.int64) or not body.size:
        raise ValueError(f"{path} is truncated: {body.size} bytes for shape {shape}. Fetch it again")
    return body.reshape(shape)


class ImageFolder:
    """Image files below a folder: one sub-folder per class, or none for images without classes.

    channels  1 or 3: images are converted to grey or RGB

    Raises ValueError for a folder that is missing or has no images, or one that mixes both layouts.
    """

    def __init__(self, path: str | Path, channels: int = 3):
        self.root, self.channels = Path(path), channels
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}; image files can be read as 1 (grey) or 3 (RGB)")
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is not a folder")
        found = sorted(_image_files(self.root))
        folders = sorted({name.split("/")[0] for name in found if "/" in name})
        loose = [name for name in found if "/" not in name]
        if not found:
            raise ValueError(f"{self.root} holds no images ({', '.join(EXTENSIONS)}), at any depth")
        if folders and loose:
            raise ValueError(
                f"{self.root} mixes images ({loose[0]}, ...) with class folders ({folders[0]}, ...): "
                "put all images into one folder per class, or none"
            )
        if folders and set(map(str.lower, folders)) <= SPLITS:
            raise ValueError(
                f"the folders of {self.root} are splits of a data set ({', '.join(folders)}), not classes: "
                f"name one of them, {self.root / folders[0]}"
            )
        self.names, self.class_names = found, folders
        label_of = {name: label for label, name in enumerate(folders)}
        self.labels = [label_of.get(name.split("/")[0], 0) for name in found]
        sizes = (os.fsencode(name) + b"\0%d\n" % (self.root / name).stat().st_size for name in found)
        self.fingerprint = hashlib.sha256(b"".join(sizes)).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> tuple[Image.Image, int]:
        path = self.root / self.names[index]
        try:
            with Image.open(path) as file:
                image = opaque(eight_bits(ImageOps.exif_transpose(file))).convert("L" if self.channels == 1 else "RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BrokenImage(f"{self.names[index]}: {error}") from error
        return image, self.labels[index]


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of at most 8 bits per channel. Pillow would clip 16 bits, not scale them: nearly all is white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range: save them with 8 or 16 bits")
    return image


def opaque(image: Image.Image) -> Image.Image:
    """An image on white where it is transparent: the colours hidden there mean nothing."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _image_files(root: Path) -> list[str]:
    """Paths below `root`, relative, with forward slashes; hidden ones are left out, links are followed once."""
    names, seen = [], set()
    for folder, folders, entries in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in entries:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                names.append((Path(folder) / name).relative_to(root).as_posix())
    return names
