"""Images that are kept as one array: the digits of the package, IDX files, and .npz files in the ADM layout."""

import gzip
import hashlib
import zipfile
import zlib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image

MOST_CLASSES = 1_000_000
SPLITS = {"train": "train", "test": "t10k"}  # of the MNIST family, and how its files call them


class ArraySource:
    """Images (N, H, W) grey or (N, H, W, 3) RGB, uint8, and labels (N,) in memory; without classes, no labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None, class_names: list[str] | None = None):
        self.images, self.class_names = images, class_names or []
        self.channels = 1 if images.ndim == 3 else 3
        self.chunks: tuple[int, ...] = (len(images),)
        self.labels = np.zeros(len(images), np.int64) if labels is None else labels
        digest = hashlib.sha256(repr(images.shape).encode())
        digest.update(np.ascontiguousarray(images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
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


def idx_folder(path: str | Path, split: str = "train") -> ArraySource:
    """The images of the MNIST family in `path`: `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, or `.gz`; with
    split "test", `t10k-...`.

    Raises ValueError if they are not there or damaged.
    """
    folder = Path(path)
    images, labels = (read_idx(_idx_file(folder, f"{SPLITS[split]}-{part}")) for part in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: images of shape {images.shape} and labels of shape {labels.shape} do not go together"
        )
    return ArraySource(images, labels, [str(label) for label in range(int(labels.max()) + 1)])


def holds_idx(folder: Path) -> bool:
    """Whether there are IDX files of images in a folder."""
    return any(folder.glob("*-images-idx3-ubyte*"))


def _idx_file(folder: Path, part: str) -> Path:
    for name in (f"{part}-ubyte", f"{part}-ubyte.gz"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    raise ValueError(f"{folder} holds no {part}-ubyte or {part}-ubyte.gz; found: {found}")


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


def npz_file(path: str | Path) -> ArraySource:
    """The images of an `.npz` file in the ADM layout: `arr_0` (N, H, W, 3) uint8, and labels `arr_1` (N,) if there.

    They are read into memory. Raises ValueError for a file that is damaged or laid out otherwise.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found = archive.files
            arrays = {name: np.asarray(archive[name]) for name in ("arr_0", "arr_1") if name in found}
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"{path} is damaged, or not an .npz file: {error}") from error
    images, labels = arrays.get("arr_0"), arrays.get("arr_1")
    if images is None:
        raise ValueError(f"{path} holds no arr_0; found: {', '.join(found) or 'nothing'}")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,), (1,)):
        raise ValueError(f"{path}: arr_0 is {images.dtype} {images.shape}; it must be uint8 (N, H, W, 3)")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"{path}: arr_1 is {labels.dtype} {labels.shape}, not a label for each of {len(images)} images"
        )
    if not len(images):
        raise ValueError(f"{path} holds no images: arr_0 is {images.shape}")
    if labels is not None and not 0 <= labels.min() <= labels.max() < MOST_CLASSES:
        raise ValueError(f"{path}: arr_1 has labels from {labels.min()} to {labels.max()}; they must count from 0")
    names = [] if labels is None else [str(label) for label in range(int(labels.max()) + 1)]
    images = images[..., 0] if images.shape[3:] == (1,) else images
    return ArraySource(images, labels if names else None, names)


def write_npz(path: Path, images: Iterable[np.ndarray], count: int, labels: np.ndarray | None = None) -> None:
    """Write `count` images (H, W, 3) uint8 as an `.npz` file in the ADM layout, one at a time: `arr_0` (N, H, W, 3),
    and `arr_1` (N,) int64 if there are labels."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for i, image in enumerate(images):
                if i == 0:
                    layout = {"descr": "|u1", "fortran_order": False, "shape": (count, *image.shape)}
                    npy.write_array_header_1_0(file, layout)
                file.write(np.ascontiguousarray(image).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                npy.write_array(file, np.asarray(labels, np.int64), allow_pickle=False)
