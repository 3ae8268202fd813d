"""Cached latents: what an autoencoder makes of images, computed once. Kept are the mean and standard deviation of its
posterior, so that training draws from it anew each time.

    FOLDER/latents.json               the autoencoder, the classes, the images, the shards and their checksums
    FOLDER/latents-00000.safetensors  mean and std (N, C, h, w) float16, labels (N,), and of mirrored images
                                      mirrored_mean and mirrored_std
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fpdm.data.sources import BrokenImage
from fpdm.files import read_json

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

    Raises ValueError for a folder that holds none, or is not complete.
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
        for shard in self.shards:
            if not (self.root / shard["file"]).is_file():
                raise ValueError(f"{self.root / shard['file']} is missing: run the same `fpdm latents` again")

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

    def _shard(self, place: int) -> Any:
        """A shard, opened and compared with its checksum at its first use. Raises BrokenImage if it is damaged."""
        if place not in self._open:
            shard = self.shards[place]
            path = self.root / shard["file"]
            try:
                if checksum(path) != shard["sha256"]:
                    raise ValueError("it is not what was written")
                self._open[place] = safe_open(path, "pt")
            except (OSError, ValueError, SafetensorError) as error:
                self._open[place] = BrokenImage(
                    f"{path.name}: {error}. Remove it and latents.json, and run the same `fpdm latents` again"
                )
        found = self._open[place]
        if isinstance(found, BrokenImage):
            raise BrokenImage(str(found))
        return found


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def holds_latents(folder: Path) -> bool:
    """Whether there are latents in a folder."""
    return (folder / INDEX).is_file() or any(folder.glob("latents-*.safetensors"))
