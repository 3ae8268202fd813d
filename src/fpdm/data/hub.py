"""Images that Hugging Face's `datasets` opens: from the hub, saved to disk, or files of a kind that it knows."""

import hashlib
import warnings
from contextlib import suppress
from glob import has_magic
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fpdm.data.arrays import MOST_CLASSES
from fpdm.data.sources import BrokenImage, check_channels, read_image, spaced, with_channels
from fpdm.files import read_json
from fpdm.names import needs, unknown

LABELS = ("label", "labels")  # what a column of numbers is called if they are classes


def hub_images(name: str | Path, split: str = "train", channels: int = 3, size: int | None = None) -> "HubImages":
    """The images of a data set on the hub, "organisation/name" or "organisation/name:configuration"; of a folder that
    `save_to_disk` wrote; or of a local folder or file that `load_dataset` opens.

    split     any that the data set has
    channels  1 or 3: images are converted to grey or RGB
    size      pixels of the squares that they will be made into: see `read_image`

    Raises ValueError for what cannot be opened or has no column of images, ImportError if `datasets` is missing.
    """
    needs("datasets", "datasets")
    check_channels(channels)
    data = open_split(Path(name), str(name), split)
    try:
        return HubImages(data, channels, size)
    except ValueError as error:
        raise ValueError(f"{name}, split {split!r}: {error}") from error


class HubImages:
    """The images of a `datasets.Dataset`: its one column of images, and its one column of class labels; without that,
    whole numbers called label or labels are the classes, and without those there are none.

    Raises ValueError, naming the columns, if there is no such choice.
    """

    def __init__(self, data: Any, channels: int = 3, size: int | None = None):
        from datasets import Image as Encoded

        column = _only_column(data, Encoded, "images")
        if column is None:
            raise ValueError(f"it has no column of images, only: {_columns(data)}")
        if not len(data):
            raise ValueError("it holds no images: choose another split")
        self.column, self.channels, self.size = column, channels, size
        self.chunks: tuple[int, ...] = (len(data),)
        # As they are stored: what `datasets` decodes is neither upright nor of 8 bits, and fails without a name.
        self.rows = data.with_format(None).select_columns([column]).cast_column(column, Encoded(decode=False))
        self.labels, self.class_names = _labels(data)
        digest = hashlib.sha256(b"%d" % len(self) + np.ascontiguousarray(self.labels, np.int64).tobytes())
        for index in spaced(len(self)):
            with suppress(OSError, BrokenImage):  # it is told of when it is read
                content = self._content(index)
                raw = content if isinstance(content, bytes) else content.read_bytes()
                digest.update(hashlib.sha256(raw).digest())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int) -> tuple[Image.Image, int]:
        image = read_image(self._content(index), f"row {index}", self.size)
        return with_channels(image, self.channels), int(self.labels[index])

    def _content(self, index: int) -> Path | bytes:
        stored = self.rows[index][self.column] or {}
        if stored.get("bytes") is None and stored.get("path") is None:
            raise BrokenImage(f"row {index}: there is no image in it")
        return Path(stored["path"]) if stored["bytes"] is None else stored["bytes"]


def open_split(path: Path, name: str, split: str) -> Any:
    """The `datasets.Dataset` of a split. Raises ValueError naming what cannot be opened."""
    from datasets import load_dataset, load_from_disk

    try:
        if (path / "dataset_dict.json").is_file():
            splits = read_json(path / "dataset_dict.json")["splits"]
            if split not in splits:
                raise ValueError(unknown("split", split, splits))
            return load_from_disk(path / split)
        if (path / "state.json").is_file():
            data = load_from_disk(path)
            if split not in ("train", str(data.split)):
                raise ValueError(f"it holds one part only: leave out the split {split!r}")
            return data
        if path.is_file() or has_magic(path.name):  # of files, `load_dataset` takes patterns within a folder
            return load_dataset(str(path.parent), data_files=path.name, split=split)
        if path.exists():
            return load_dataset(name, split=split)
        repository, _, configuration = name.partition(":")
        return load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # a data set can be of any files, and each can raise anything
        raise ValueError(f"datasets cannot open {name}, split {split!r}: {error}") from error


def _labels(data: Any) -> tuple[np.ndarray, list[str]]:
    """Labels (N,) and class names. Raises ValueError for labels that are missing or do not count from 0."""
    from datasets import ClassLabel, Value

    column = _only_column(data, ClassLabel, "class labels")
    if column is None:
        features = data.features
        whole = [name for name in LABELS if isinstance(features.get(name), Value) and "int" in features[name].dtype]
        column = next(iter(whole), None)
    if column is None:
        if others := [name for name in LABELS if name in data.features]:
            feature, encoded = data.features[others[0]], f"data.class_encode_column({others[0]!r})"
            kind, todo = type(feature).__name__, "an image has one class here: make a column of one first"
            if isinstance(feature, Value):
                kind, todo = feature.dtype, f"if it names them, save {encoded} first"
            warnings.warn(f"column {others[0]} is of {kind}, and taken for no classes: {todo}", stacklevel=4)
        return np.zeros(len(data), np.int64), []
    values = data.with_format("arrow").select_columns([column])[:][column]
    if values.null_count:
        raise ValueError(f"column {column} has no label in {values.null_count} of {len(data)} rows: choose other data")
    labels = values.to_numpy()
    if not 0 <= labels.min() <= labels.max() < MOST_CLASSES:
        found = f"labels from {labels.min()} to {labels.max()}"
        raise ValueError(f"column {column} has {found}; they must count from 0: choose a split with labels")
    if isinstance(data.features[column], ClassLabel):
        return labels, list(data.features[column].names)
    return labels, [str(label) for label in range(int(labels.max()) + 1)]


def _only_column(data: Any, kind: type, called: str) -> str | None:
    found = [name for name, feature in data.features.items() if isinstance(feature, kind)]
    if len(found) > 1:
        raise ValueError(
            f"it has several columns of {called}: {', '.join(found)}. "
            "Keep one with `select_columns`, save that with `save_to_disk`, and name its folder"
        )
    return found[0] if found else None


def _columns(data: Any) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in data.features.items())
