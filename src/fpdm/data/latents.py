"""Cached latents: what an autoencoder makes of images, computed once. Kept are the mean and standard deviation of its
posterior, so that training draws from it anew each time.

    FOLDER/latents.json               the autoencoder, the classes, the images, the shards and their checksums
    FOLDER/latents-00000.safetensors  mean and std (N, C, h, w) float16, labels (N,), and of mirrored images
                                      mirrored_mean and mirrored_std
    FOLDER/latents-00000.sha256       the checksum of that shard from when it was made
"""

import hashlib
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from fpdm.data.sources import BrokenImage
from fpdm.files import cache_folder, checksum, read_json, wait_for, write_json

INDEX = "latents.json"
FORMAT = 1


class Latent(NamedTuple):
    """The posterior of one image: mean and std, each (C, h, w), and those of its mirror image where they were kept."""

    mean: Tensor
    std: Tensor
    mirrored: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Autoencoder:
    """Which autoencoder latents are of.

    name    the folder or hub name it was opened by
    digest  of its weights
    scale   and `shift`: a network sees (latent - shift) scale
    """

    name: str
    digest: str
    scale: float
    shift: float

    @property
    def known_by(self) -> list[str | float]:
        """What makes it the same one, wherever it lies."""
        return [self.digest, self.scale, self.shift]


@dataclass(frozen=True)
class LatentPreparation:
    """A draw from the posterior as a network takes it, (C, h, w) float32, for a `Stream`.

    flip  of mirrored images with probability 1/2; needs a cache that has them
    """

    scale: float
    shift: float
    flip: bool = False

    def __call__(self, latent: Latent, generator: torch.Generator) -> Tensor:
        mirror = float(torch.rand((), generator=generator)) < 0.5
        mean, std = latent.mirrored if self.flip and mirror and latent.mirrored else (latent.mean, latent.std)
        drawn = mean.float() + std.float() * torch.randn(mean.shape, generator=generator)
        return (drawn - self.shift) * self.scale


class LatentFolder:
    """A cache of latents as a source: `load` gives a `Latent` and a label.

    shape        (C, h, w) of a latent
    autoencoder  what made them
    mirrored     whether mirrored images were encoded, too

    Raises ValueError for a folder that holds none, is not complete, or has a shard that is damaged.
    """

    def __init__(self, path: str | Path):
        self.root = Path(path)
        if not (self.root / INDEX).is_file():
            begun = any(self.root.glob("latents-*.safetensors")) if self.root.is_dir() else False
            what = "is not complete: run the same `fpdm latents` again" if begun else f"holds no {INDEX}"
            raise ValueError(
                f"{path} {what}. Latents are made with `fpdm latents IMAGES --vae VAE --out FOLDER`: name that FOLDER"
            )
        index: dict[str, Any] = read_json(self.root / INDEX)
        if index.get("format") != FORMAT:
            raise ValueError(f"{self.root / INDEX} is of format {index.get('format')}, not {FORMAT}: make it anew")
        self.shape = tuple(index["shape"])
        self.channels = self.shape[0]
        self.class_names: list[str] = index["class_names"]
        self.autoencoder, self.mirrored = Autoencoder(**index["autoencoder"]), bool(index["mirrored"])
        self.shards: list[dict[str, Any]] = index["shards"]
        self.labels: list[int] = index["labels"]
        self.chunks: tuple[int, ...] = (len(self.labels),)
        self.starts = torch.tensor([0, *(shard["images"] for shard in self.shards)]).cumsum(0)
        self.fingerprint = hashlib.sha256("".join(shard["sha256"] for shard in self.shards).encode()).hexdigest()
        self._open: dict[int, Any] = {}
        self._verify()

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}  # workers open files of their own

    def load(self, index: int) -> tuple[Latent, int]:
        place = int(torch.searchsorted(self.starts, index, right=True)) - 1
        row = index - int(self.starts[place])
        file = self._shard(place)
        mean, std = (file.get_slice(name)[row] for name in ("mean", "std"))
        mirrored = None
        if self.mirrored:
            mirrored = (file.get_slice("mirrored_mean")[row], file.get_slice("mirrored_std")[row])
        return Latent(mean, std, mirrored), self.labels[index]

    def _verify(self) -> None:
        """Compare the shards with their checksums, once on a machine: what was compared is remembered by size and time.

        Raises ValueError for one that is missing or damaged.
        """
        key = hashlib.sha256(f"{self.root.resolve()} {self.fingerprint}".encode()).hexdigest()[:16]
        record = cache_folder() / f"verified-{key}.json"
        with ExitStack() as stack:
            with suppress(OSError):  # of a cache that cannot be written to: each process compares for itself
                stack.enter_context(wait_for(record))  # one process does it for all
            known = read_json(record) if record.is_file() else {}
            found = self._compared(known)
            if found != known:
                with suppress(OSError):
                    write_json(record, found)

    def _compared(self, known: dict[str, Any]) -> dict[str, Any]:
        """Size and time of each shard, by name. Those that are `known` by these are not read. Raises ValueError."""
        found = {}
        for shard in tqdm(self.shards, "comparing latents with their checksums", leave=False, delay=2):
            path = self.root / shard["file"]
            if not path.is_file():
                raise ValueError(f"{path} is missing: run the same `fpdm latents` again")
            stat = path.stat()
            found[path.name] = [stat.st_size, stat.st_mtime_ns]
            if known.get(path.name) != found[path.name] and checksum(path) != shard["sha256"]:
                raise ValueError(
                    f"{path} is damaged: it is not what was written. Run the same `fpdm latents` again, which encodes "
                    "it anew"
                )
        return found

    def _shard(self, place: int) -> Any:
        """A shard, opened at its first use. Raises BrokenImage if that cannot be."""
        if place not in self._open:
            path = self.root / self.shards[place]["file"]
            try:
                self._open[place] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise BrokenImage(f"{path.name}: {error}") from error
        return self._open[place]


def holds_latents(folder: Path) -> bool:
    """Whether there are latents in a folder."""
    return (folder / INDEX).is_file() or any(folder.glob("latents-*.safetensors"))
