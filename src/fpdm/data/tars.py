"""Where the images of a tar file are, so that any one can be read without those before it.

Members are grouped into samples as webdataset does it: those that follow each other and whose paths are equal up to the
first dot of the file name.
"""

import hashlib
import json
import re
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fpdm.data.arrays import MOST_CLASSES
from fpdm.data.sources import EXTENSIONS
from fpdm.files import cache_folder, read_json, write_json

FORMAT = 2  # of the kept indexes: older ones are made again
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # key, suffix
META = re.compile(r"__[^/]*__($|/)")  # about the shard, not a sample
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Index:
    """The samples of a shard that have an image.

    names    of the images' members
    offsets  of their first bytes in the shard
    sizes    of them, in bytes
    labels   of the samples; None where none has a label
    without  how many other samples have no image
    example  the files of one of these; "" if there are none
    fault    why the shard ends before its end; None for a whole one
    """

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int] | None
    without: int
    example: str
    fault: str | None


class Member(NamedTuple):
    """A file in a tar file."""

    name: str
    key: str
    suffix: str
    offset: int
    size: int

    def read(self, file: BinaryIO) -> bytes:
        file.seek(self.offset)
        return file.read(self.size)


def index_of(path: Path) -> Index:
    """The index of a shard: the one that was kept of it as it is now, or else a new one.

    It is kept beside the shard, or in the cache where that cannot be written to. Raises ValueError, naming the shard,
    for one that cannot be read or whose samples are not one image and one label each.
    """
    status = path.stat()
    # Another Pillow may find images where there were none.
    stamp = {
        "format": FORMAT, "extensions": list(EXTENSIONS), "size": status.st_size, "mtime_ns": status.st_mtime_ns,
    }  # fmt: skip
    absolute = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    beside = path.with_name(f".{path.name}.index.json")
    aside = cache_folder() / "shards" / f"{absolute}-{path.name}.index.json"
    for kept in (beside, aside):
        with suppress(OSError, ValueError):
            found = read_json(kept)
            if isinstance(found, dict) and found.get("stamp") == stamp:
                return Index(**found["index"])
    index = make_index(path)
    try:
        write_json(beside, {"stamp": stamp, "index": vars(index)})
    except OSError:
        with suppress(OSError):  # it is made again every time: slow, not wrong
            aside.parent.mkdir(parents=True, exist_ok=True)
            write_json(aside, {"stamp": stamp, "index": vars(index)})
    return index


def make_index(path: Path) -> Index:
    """The index of a shard, read off its members: see `index_of`."""
    members, fault = read_members(path)
    samples = [list(group) for _, group in groupby(members, key=lambda member: member.key)]
    images, labels, others = [], [], []
    with path.open("rb") as file:
        for sample in samples[:-1] if fault else samples:  # of the last one, members may be missing
            if (image := image_of(sample, path)) is None:
                others.append(", ".join(member.name for member in sample))
                continue
            images.append(image)
            labels.append(label_of(sample, path, file))
    if None in labels and len(set(labels)) > 1:
        without = images[labels.index(None)].key
        raise ValueError(
            f"{path}: some samples have a label and {without} has none: give one to all images, or to none"
        )
    return Index(
        [image.name for image in images],
        [image.offset for image in images],
        [image.size for image in images],
        None if None in labels else [label for label in labels if label is not None],
        len(others),
        others[0] if others else "",
        fault,
    )


def read_members(path: Path) -> tuple[list[Member], str | None]:
    """The files in a tar file that belong to samples, and why it ends early, if it does.

    Raises ValueError naming a file that is no tar file.
    """
    members: list[Member] = []
    with path.open("rb") as file:
        if file.read(len(GZIP)) == GZIP:
            raise ValueError(f"{path} is compressed, and its images could not be read singly: unpack it with gunzip")
        file.seek(0)
        try:
            tar = tarfile.TarFile(fileobj=file)
        except Exception as error:  # a damaged header can raise anything
            raise ValueError(f"{path} is damaged, or not a tar file ({error}): remove it and fetch it again") from error
        try:
            for info in tar:
                found = NAME.fullmatch(info.name)
                if info.isreg() and found and not META.match(info.name):
                    members.append(Member(info.name, found[1], found[2].lower(), info.offset_data, info.size))
        except Exception as error:  # likewise
            return members, str(error)
        file.seek(tar.offset)  # tarfile also stops, without a word, at what is no header
        whole = file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
    return members, None if whole else f"no header and no end at byte {tar.offset}"


def image_of(sample: list[Member], path: Path) -> Member | None:
    """The image of a sample, if it has one: `key.png`, or without such `key.anything.png`.

    Raises ValueError for two members of one name, and for several images.
    """
    suffixes = [member.suffix for member in sample]
    if len(set(suffixes)) < len(suffixes):
        raise ValueError(f"{path}: sample {sample[0].key} has a suffix twice: {', '.join(suffixes)}")
    images = [member for member in sample if f".{member.suffix}".endswith(EXTENSIONS)]
    images = [member for member in images if f".{member.suffix}" in EXTENSIONS] or images
    if len(images) > 1:
        names = ", ".join(image.name for image in images)
        raise ValueError(f"{path}: which is the image of sample {sample[0].key}: {names}? Leave the others out")
    return images[0] if images else None


def label_of(sample: list[Member], path: Path, file: BinaryIO) -> int | None:
    """The label of a sample: the number in its `.cls`, or "label" or "class" in its `.json` if that is an integer.

    Raises ValueError, naming the member, for one that is damaged or does not count from 0.
    """
    by_suffix = {member.suffix: member for member in sample}
    member = by_suffix.get("cls") or by_suffix.get("json")
    if member is None:
        return None
    raw = member.read(file)
    try:
        label = int(raw) if member.suffix == "cls" else _label_in(json.loads(raw))
    except ValueError as error:
        wanted = "a whole number" if member.suffix == "cls" else "JSON"
        raise ValueError(f"{path}: {member.name} is not {wanted}: {raw[:40]!r}") from error
    if label is not None and not 0 <= label < MOST_CLASSES:
        raise ValueError(f"{path}: {member.name} has label {label}; labels must count from 0")
    return label


def _label_in(value: object) -> int | None:
    found = [value.get("label"), value.get("class")] if isinstance(value, dict) else []
    return next((label for label in found if isinstance(label, int) and not isinstance(label, bool)), None)
