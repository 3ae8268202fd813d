"""What a word on the command line means: which images, in which kind of files."""

from collections.abc import Callable
from pathlib import Path

from fpdm.data.arrays import SPLITS, digits, holds_idx, idx_folder, npz_file
from fpdm.data.hub import hub_images
from fpdm.data.latents import holds_latents
from fpdm.data.shards import COMPRESSED, URLS, Shards, tars_in
from fpdm.data.sources import ImageFolder, Source, holds_images
from fpdm.names import unknown

KINDS = {
    "auto": "whatever it looks like",
    "digits": "the digits of the package",
    "folder": "a folder of images",
    "idx": "a folder of IDX files",
    "npz": "an .npz file",
    "datasets": "a data set of Hugging Face's",
    "shards": "tar files of webdataset",
}
HUB = "hub:"
SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # by `datasets`


def open_images(
    place: str, channels: int = 3, split: str = "train", kind: str = "auto", size: int | None = None
) -> Source:
    """The images that a word on the command line means: "digits", an `.npz` file, a folder of IDX files or of images,
    tar files (see `Shards`), a folder that `datasets` saved, or "hub:organisation/name".

    channels  as which image files are read
    split     "train" or "test" of IDX files, any that there is of a data set of `datasets`; other data has one part
              only, "train"
    kind      one of `KINDS`; "auto" looks at what is there
    size      pixels of the squares that image files will be made into, if that is known: large ones are then read
              faster (see `read_image`)

    Raises ValueError if there are none, or they are of another kind; ImportError if `datasets` is needed and missing.
    """
    if kind not in KINDS:
        raise ValueError(unknown("kind of data", kind, KINDS))
    if holds_latents(Path(place)):
        raise ValueError(f"{place} holds cached latents, which only training reads, with --source latents")
    looks = kind_of(place)
    meant = looks if kind == "auto" else kind
    if meant != "datasets":
        check_split(place, split, meant)
    if meant is None:
        others = "shards (.tar), a data set of Hugging Face's (hub:NAME), or digits"
        there = f"{place} is of no kind that is read" if Path(place).exists() else f"there is no {place}"
        raise ValueError(f"{there}: name a folder of images or IDX files, an .npz file, {others}")
    opened: dict[str, Callable[[], Source]] = {
        "digits": lambda: _digits(place),
        "folder": lambda: ImageFolder(place, channels, size),
        "idx": lambda: idx_folder(place, split),
        "npz": lambda: npz_file(place),
        "datasets": lambda: hub_images(place.removeprefix(HUB), split, channels, size),
        "shards": lambda: Shards(place, channels, size),
    }
    try:
        return opened[meant]()
    except ValueError as error:
        if looks in (None, meant):
            raise
        raise ValueError(
            f"{str(error).rstrip('.')}. It looks like {KINDS[str(looks)]}: ask for kind {looks!r} (--source {looks})"
        ) from error


def kind_of(place: str) -> str | None:
    """The kind of data that a place looks like, without opening it; None if nothing is there."""
    path = Path(place)
    if path.is_dir():
        return "digits" if place == "digits" and not holds_idx(path) else _kind_of_folder(path)
    if place == "digits":
        return "digits"
    if place.startswith(HUB):
        return "datasets"
    if place.startswith(URLS) or place.endswith(".tar") or COMPRESSED.search(place):
        return "shards"
    return "npz" if path.suffix == ".npz" and path.is_file() else None


def _kind_of_folder(folder: Path) -> str:
    if holds_idx(folder):
        return "idx"
    if any((folder / name).is_file() for name in SAVED):
        return "datasets"
    return "shards" if tars_in(folder) and not holds_images(folder) else "folder"


def check_split(place: str, split: str, kind: str | None) -> None:
    """Raises ValueError for a split that data of this kind does not have."""
    if split not in SPLITS:
        raise ValueError(unknown("split", split, SPLITS))
    if split != "train" and kind != "idx":
        only = "only folders of IDX files have, and data sets of Hugging Face's"
        raise ValueError(f"{place} has no split {split!r}, {only}: name its folder of images")


def _digits(place: str) -> Source:
    if place != "digits":
        raise ValueError(f"{place} was named, and the digits of the package have no other place than the word digits")
    return digits()
