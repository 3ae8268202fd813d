"""Where images come from. A source is indexable, has classes or none, and tells a fingerprint of what it holds."""

import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

# Of single pictures. What else Pillow opens are documents, films, icons, textures and measurements.
FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP"}
NOT_STILL = {".apng", ".avifs", ".pfm"}  # films, and numbers of no known range, in the same formats
WHOLLY_HASHED = 2**30  # bytes
MOST_HASHED = 1000  # images of a larger set
SPLITS = {"train", "test", "val", "valid", "validation"}
SPARE = 4  # a photograph is decoded at no less than so many times the size that is wanted: the rest is averaged


def extensions() -> tuple[str, ...]:
    """How the names of images end, in small letters: those of `FORMATS` that the installed Pillow can open."""
    Image.init()
    found = Image.registered_extensions().items()
    return tuple(sorted(end for end, name in found if name in FORMATS & set(Image.OPEN) and end not in NOT_STILL))


EXTENSIONS = extensions()
# Tools that draw write all that they were asked into their images, which Pillow refuses from a megabyte.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
BY_NAME = f"Files are taken for images by their names ({', '.join(EXTENSIONS)}): convert others to one of these"


class BrokenImage(ValueError):
    """An image that cannot be read; its text names the file and the reason."""


class Source(Protocol):
    """Images with or without classes.

    labels       (N,) of all images; 0 without classes
    class_names  one per class; none for images without classes
    channels     1 (grey) or 3 (RGB) of every image that `load` returns
    chunks       how many images lie together, one run after the other; a single run where any order is as fast
    fingerprint  changes with the data, not when it is moved
    """

    class_names: list[str]
    channels: int
    chunks: tuple[int, ...]
    fingerprint: str

    @property
    def labels(self) -> Sequence[int] | np.ndarray: ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Any, int]:
        """The image (or its latent) and its label (0 without classes). Raises BrokenImage if it cannot be read."""


class ImageFolder:
    """Image files below a folder: one sub-folder per class, or none for images without classes.

    channels  1 or 3: images are converted to grey or RGB
    size      pixels of the squares that they will be made into: see `read_image`

    Folders beside those of classes that hold nothing, or other files only, are named in a warning, and so are files of
    another kind where they are more. Raises ValueError for a folder that is missing or has no images, one that mixes
    both layouts, or holds folders that cannot be read.
    """

    def __init__(self, path: str | Path, channels: int = 3, size: int | None = None):
        self.root, self.channels, self.size = Path(path), channels, size
        check_channels(channels)
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is not a folder")
        files = list(_files(self.root))
        found = sorted(name for name in files if is_image(name))
        folders = _folders(found)
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
        there = {place.name for place in self.root.iterdir() if place.is_dir() and not place.name.startswith(".")}
        if folders and (without := sorted(there - {*folders})):
            some = ", ".join(without[:5]) + (" and others" if len(without) > 5 else "")
            warnings.warn(
                f"{self.root} has folders without images, which are no classes: {some}. {BY_NAME}", stacklevel=2
            )
        known = {*found}
        others = Counter(Path(name).suffix for name in files if name not in known).most_common(1)
        if others and others[0][1] > len(found):  # captions beside all images are usual
            warnings.warn(
                f"{self.root} has {len(found)} images, and {others[0][1]} files {others[0][0]!r} taken for none. "
                + BY_NAME,
                stacklevel=2,
            )
        self.names, self.class_names = found, folders
        label_of = {name: label for label, name in enumerate(folders)}
        self.labels = [label_of.get(name.split("/")[0], 0) for name in found]
        self.chunks: tuple[int, ...] = (len(found),)
        self.fingerprint = fingerprint_of(self.root, found)

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> tuple[Image.Image, int]:
        image = read_image(self.root / self.names[index], self.names[index], self.size)
        return with_channels(image, self.channels), self.labels[index]


def check_channels(channels: int) -> None:
    """Raises ValueError unless images can be read with so many channels."""
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; image files can be read as 1 (grey) or 3 (RGB)")


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image in grey ("L") for 1 channel, in RGB for 3."""
    return image.convert("L" if channels == 1 else "RGB")


def fingerprint_of(root: Path, names: list[str]) -> str:
    """A SHA-256 of the files' names, sizes and contents; of more than 1 GB, of the contents of 1,000 of them."""
    sizes = {name: size_of(root / name) for name in names}
    chosen = range(len(names)) if sum(sizes.values()) <= WHOLLY_HASHED else spaced(len(names))
    digest = hashlib.sha256(b"".join(os.fsencode(name) + b"\0%d\n" % size for name, size in sizes.items()))
    for index in chosen:
        with suppress(OSError):  # it cannot be read as an image either, and is told of there
            digest.update(hashlib.sha256((root / names[index]).read_bytes()).digest())
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """The size of a file in bytes; -1 where a link leads nowhere, which is no reason to refuse all other files."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def spaced(count: int) -> range:
    """Which of `count` images a fingerprint looks into: at most 1,000 of them, evenly spaced."""
    return range(0, count, max(1, -(-count // MOST_HASHED)))


def read_image(content: Path | bytes, name: str, size: int | None = None) -> Image.Image:
    """An image, a file or its bytes, as it is to be looked at: upright, 8 bits, not transparent, grey ("L") or RGB.

    size  pixels of the square that it will be made into; None leaves it as large as it is. A JPEG of eight times that
          or more is read at a half, a quarter or an eighth, which its decoder does in far less time (libjpeg's scaling)

    Raises BrokenImage, calling it `name`, if it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
            if size is not None:
                file.draft(None, (SPARE * size, SPARE * size))  # the least size; other formats leave it
            known = file.format == "PPM"  # of which Pillow makes numbers of 16 bits, where 8 are too few
            image = opaque(eight_bits(ImageOps.exif_transpose(file), known))
            return image if image.mode == "L" else image.convert("RGB")
    except UnidentifiedImageError as error:  # Pillow's text names an object in memory
        raise BrokenImage(f"{name}: it is no image, or of a format that Pillow does not know") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything, struct.error and TypeError among them
        raise BrokenImage(f"{name}: {error}") from error


def eight_bits(image: Image.Image, known: bool = False) -> Image.Image:
    """An image of at most 8 bits per channel. Pillow would clip 16 bits, not scale them: nearly all is white. `known`
    says that integers of unknown range have 16."""
    if image.mode.startswith("I;16") or (known and image.mode == "I"):
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


def _folders(names: list[str]) -> list[str]:
    """The first folders of paths, in order, each once."""
    return sorted({name.split("/")[0] for name in names if "/" in name})


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def holds_images(root: Path) -> bool:
    """Whether there are image files in a folder, at any depth."""
    return any(is_image(name) for name in _files(root))


def _files(root: Path) -> Iterator[str]:
    """Paths below `root`, relative, with forward slashes; hidden ones are left out, links are followed once. Raises
    ValueError for a folder that cannot be read."""

    def refuse(error: OSError) -> None:  # else its images, a class perhaps, would be missing without a word
        raise ValueError(f"the folder {error.filename} cannot be read ({error.strerror}): mend it, or move it away")

    seen = set()
    for folder, folders, entries in os.walk(root, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(folder)) in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in entries:
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()
