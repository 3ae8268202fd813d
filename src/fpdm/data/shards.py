"""Images in tar files, the shards of webdataset. Any image is read by itself, so that they are shuffled, resumed and
shared out between processes as those of any other source."""

import hashlib
import re
import warnings
from contextlib import suppress
from glob import glob, has_magic
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
from PIL import Image
from tqdm import tqdm

from fpdm.data.fetch import fetched
from fpdm.data.sources import EXTENSIONS, BrokenImage, check_channels, read_image, spaced, with_channels
from fpdm.data.tars import Index, index_of
from fpdm.files import read_json

NAMES = ("classes.json", "classes.txt")
URLS = ("http://", "https://")
COMPRESSED = re.compile(r"\.(tgz|tar\.\w+)$")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


class Shards:
    """The images of tar files: one of each sample, with the label in its `.cls` or `.json`. They have classes if they
    have labels, named by `classes.json` (a list) or `classes.txt` (lines) beside the shards, or else by numbers.

    place     a tar file, a folder of them, or several: "data-{000..012}.tar", "data-*.tar"; also http(s) URLs with
              braces, which are fetched whole into the cache
    channels  1 or 3: images are converted to grey or RGB
    size      pixels of the squares that they will be made into: see `read_image`

    A shard that ends early is named in a warning, and its whole samples are used; another counts the samples without an
    image. Raises ValueError, naming the shard, for one that is missing or unreadable.
    """

    def __init__(self, place: str | Path, channels: int = 3, size: int | None = None):
        check_channels(channels)
        paths = tqdm(shard_paths(str(place)), "indexing shards", unit="shard", leave=False, delay=2, disable=None)
        found = [(path, index_of(path)) for path in paths]
        _tell_what_is_left_out(str(place), found)
        found = [(path, index) for path, index in found if index.names]
        self.channels, self.size = channels, size
        self.paths = [path for path, _ in found]
        self.chunks = tuple(len(index.names) for _, index in found)
        self.names = [name for _, index in found for name in index.names]
        self.offsets = np.concatenate([np.array(index.offsets, np.int64) for _, index in found])
        self.sizes = np.concatenate([np.array(index.sizes, np.int64) for _, index in found])
        labels = _labels(found)
        self.labels = np.zeros(len(self.names), np.int64) if labels is None else labels
        self.class_names = [] if labels is None else _class_names(str(place), self.paths[0], int(labels.max()) + 1)
        self._ends = np.cumsum(self.chunks)
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> tuple[Image.Image, int]:
        name = f"{self._shard(index).name}/{self.names[index]}"
        try:
            content = self._content(index)
        except OSError as error:
            raise BrokenImage(f"{name}: {error}") from error
        return with_channels(read_image(content, name, self.size), self.channels), int(self.labels[index])

    def _shard(self, index: int) -> Path:
        return self.paths[int(np.searchsorted(self._ends, index, side="right"))]

    def _content(self, index: int) -> bytes:
        # Opened anew: a file that is kept open would share its position with the workers that are forked.
        with self._shard(index).open("rb") as file:
            file.seek(int(self.offsets[index]))
            return file.read(int(self.sizes[index]))

    def _fingerprint(self) -> str:
        """A SHA-256 of names, sizes and labels, and of the contents of up to 1,000 images."""
        digest = hashlib.sha256(repr(self.chunks).encode())
        for name, size, label in zip(self.names, self.sizes.tolist(), self.labels.tolist(), strict=True):
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0%d %d\n" % (size, label))
        for index in spaced(len(self)):
            with suppress(OSError):  # it cannot be read as an image either, and is told of there
                digest.update(hashlib.sha256(self._content(index)).digest())
        return digest.hexdigest()


def shard_paths(place: str) -> list[Path]:
    """The tar files that `place` means, in order; those on the web are fetched. Raises ValueError if one is missing."""
    if COMPRESSED.search(place):
        raise ValueError(f"{place} is compressed, and its images could not be read singly: unpack it to .tar")
    if place.startswith(URLS):
        return [fetched(url) for url in tqdm(braces(place), "fetching shards", unit="shard", leave=False, disable=None)]
    path = Path(place)
    if path.is_dir():
        found = tars_in(path)
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for word in braces(place) for name in (sorted(glob(word)) if has_magic(word) else [word])]
    if not found:
        raise ValueError(f"there are no shards {place}: name tar files, a folder of them, or their URLs")
    if missing := [str(path) for path in found if not path.is_file()]:
        raise ValueError(f"{len(missing)} of the {len(found)} shards {place} are not there, the first {missing[0]}")
    return found


def tars_in(folder: Path) -> list[Path]:
    """The tar files in a folder, but for hidden ones, in the order of their names."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def braces(pattern: str) -> list[str]:
    """What a shell makes of braces.

    >>> braces("{a,b}-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, listed = found.groups()
    numbers = [] if listed is not None else range(int(first), int(last) + 1)
    words = listed.split(",") if listed is not None else [f"{number:0{len(first)}}" for number in numbers]
    before, after = pattern[: found.start()], pattern[found.end() :]
    # Once each: braces within braces are expanded first, and what is beside them comes with each of their words.
    return list(dict.fromkeys(each for word in words for each in braces(before + word + after)))


def _tell_what_is_left_out(place: str, found: list[tuple[Path, Index]]) -> None:
    """Warns of shards that end early and of samples without an image. Raises ValueError if no sample has one."""
    for path, index in found:
        if index.fault is not None:
            used = f"its first {len(index.names)} samples are used"
            warnings.warn(f"{path} ends early ({index.fault}): {used}. Remove it and fetch it again", stacklevel=3)
    without = sum(index.without for _, index in found)
    example = next((f", such as {path.name}/{index.example}" for path, index in found if index.without), "")
    if not any(index.names for _, index in found):
        raise ValueError(
            f"the shards {place} hold no images: a sample has one with its own name, 0001.jpg for one, and here are "
            f"{without} samples without{example}"
        )
    if without:
        warnings.warn(
            f"samples without an image are left out, {without} in {place}{example}. Images are known by their names "
            f"({', '.join(EXTENSIONS)})",
            stacklevel=3,
        )


def _labels(found: list[tuple[Path, Index]]) -> np.ndarray | None:
    """Labels (N,), or None where there are none. Raises ValueError if only some shards have labels."""
    without = next((path for path, index in found if index.labels is None), None)
    if without is None:
        return np.concatenate([np.array(index.labels, np.int64) for _, index in found])
    if labelled := next((path for path, index in found if index.labels is not None), None):
        raise ValueError(f"{labelled} has labels and {without} has none: give one to all images, or to none")
    return None


def _class_names(place: str, shard: Path, count: int) -> list[str]:
    """The names beside the shards, or else numbers. Raises ValueError for fewer than `count`, or what is no list."""
    for name in NAMES:
        if place.startswith(URLS):
            path = fetched(urljoin(braces(place)[0], name), or_empty=True)
        else:
            path = shard.with_name(name)
        if path.is_file() and path.stat().st_size:
            names = read_json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8").splitlines()
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) < count:
                raise ValueError(f"{path} must list the names of the {count} classes, and has {str(names)[:80]}")
            return names
    return [str(label) for label in range(count)]
