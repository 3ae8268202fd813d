"""Images to cached latents, a shard at a time: what is there already is not encoded again."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fpdm.data.latents import FORMAT, INDEX, Autoencoder
from fpdm.data.sources import BrokenImage, Source
from fpdm.data.transforms import central, pixels
from fpdm.files import checksum, read_json, write_aside, write_json
from fpdm.weights import check_whole, digest

SHARD = 1024  # images
NAME = "latents-{:05d}.safetensors"
CHECKSUM = ".sha256"  # in the place of its suffix: the file that keeps what a shard was when it was made


def open_autoencoder(name: str) -> tuple[AutoencoderKL, Autoencoder]:
    """The autoencoder in a folder (also the `vae` inside a pipeline's) or on the hub, and what it is known by.

    Raises ValueError if there is none, or one without a scale.
    """
    inside = Path(name) / "vae"
    try:
        vae = AutoencoderKL.from_pretrained(inside if inside.is_dir() else name)
    except (OSError, ValueError, SafetensorError) as error:
        elsewhere = "" if Path(name).exists() else "there is no such folder, and the hub has none, or is not reached: "
        raise ValueError(f"the autoencoder {name} cannot be opened: {elsewhere}{error}") from error
    check_whole(vae, f"{name} holds another network than an AutoencoderKL")
    if not vae.config.get("scaling_factor"):
        raise ValueError(f"the autoencoder {name} tells no scaling_factor, by which its latents are near unit variance")
    return vae.eval(), described(vae, name)


def described(vae: AutoencoderKL, name: str = "") -> Autoencoder:
    """What an autoencoder is known by."""
    shift = vae.config.get("shift_factor") or 0.0
    return Autoencoder(name, digest(vae), float(vae.config.scaling_factor), float(shift))


@dataclass
class Encoder:
    """Encodes `source` into `out`, square images of `size` pixels.

    mirrored    whether mirrored images are encoded, too
    process     number of this process and of all: each looks after every so-manieth shard
    on_image    called with the number of images done

    Raises ValueError if `out` holds latents of something else, or the size does not fit the autoencoder.
    """

    source: Source
    vae: AutoencoderKL
    autoencoder: Autoencoder
    out: Path
    size: int
    mirrored: bool = False
    batch_size: int = 16
    process: tuple[int, int] = (0, 1)
    on_image: Callable[[int], Any] = lambda _: None

    def __post_init__(self) -> None:
        reduction = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if self.size % reduction:
            raise ValueError(
                f"image size {self.size} is not a multiple of {reduction}, by which the autoencoder shrinks"
            )
        if self.vae.config.in_channels not in (1, 3):
            raise ValueError(f"the autoencoder takes {self.vae.config.in_channels} channels; images have 1 or 3")
        self.shards = range(-(-len(self.source) // SHARD))

    @property
    def request(self) -> dict[str, Any]:
        """What the latents are of; a folder holds those of one."""
        return {
            "format": FORMAT,
            "images": self.source.fingerprint,
            "autoencoder": self.autoencoder.known_by,
            "dtype": str(self.vae.dtype).removeprefix("torch."),
            "size": self.size,
            "mirrored": self.mirrored,
        }

    def claim(self) -> None:
        """Make `out` the folder of this request. One process calls it, before any encodes."""
        path = self.out / "request.json"
        if path.is_file() and (old := read_json(path)) != self.request:
            changed = ", ".join(key for key, value in self.request.items() if old.get(key) != value)
            raise ValueError(f"{self.out} holds latents of something else ({changed}): choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        for torn in self.out.glob(".latents-*.writing"):  # of a process that was killed
            torn.unlink()
        write_json(path, self.request)

    def missing(self) -> list[int]:
        """Of this process's shards those that are not there yet, or damaged."""
        process, processes = self.process
        checksums = self._checksums()
        return [number for number in self.shards[process::processes] if not self._is_done(number, checksums)]

    @torch.no_grad()
    def run(self, numbers: list[int] | None = None) -> None:
        """Make these shards; those of this process that are missing if none are named."""
        for number in self.missing() if numbers is None else numbers:
            images = range(number * SHARD, min(len(self.source), (number + 1) * SHARD))
            path = self.out / NAME.format(number)
            tensors, broken = self._encoded(images)
            # One entry, as safetensors writes several in any order, and equal shards are to be equal files.
            about = {"about": json.dumps({"request": self.request, "broken": broken}, sort_keys=True)}
            write_aside(path, lambda aside: save_file(tensors, aside, about))  # noqa: B023
            line = f"{checksum(path)}  {path.name}\n"  # as sha256sum reads it
            write_aside(path.with_suffix(CHECKSUM), lambda aside: aside.write_text(line))  # noqa: B023
            self.on_image(len(images))

    def finish(self) -> list[str]:
        """Write the index. One process calls it, once all are done; the images that could not be read."""
        shards, labels, broken, shape, checksums = [], [], [], [], self._checksums()
        for number in self.shards:
            path = self.out / NAME.format(number)
            with safe_open(path, "pt") as file:
                found = file.get_tensor("labels").tolist()
                shape = file.get_slice("mean").get_shape()[1:]
                broken += json.loads(file.metadata()["about"])["broken"]
            labels += found
            shards.append({"file": path.name, "images": len(found), "sha256": checksums[path.name]})
        if not labels:
            raise ValueError(f"none of the images can be read: {'; '.join(broken[:3])}")
        index = {
            "format": FORMAT,
            "autoencoder": asdict(self.autoencoder),
            "shape": shape,
            "class_names": self.source.class_names,
            "mirrored": self.mirrored,
            "broken": broken,
            "shards": shards,
            "labels": labels,
        }
        write_json(self.out / INDEX, index)
        return broken

    def _is_done(self, number: int, checksums: dict[str, str]) -> bool:
        path = self.out / NAME.format(number)
        if not path.is_file() or checksum(path) != checksums.get(path.name):
            return False
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("about", "{}")).get("request") == self.request
        return False

    def _checksums(self) -> dict[str, str]:
        """What each shard was when it was made, by its name: as the file beside it says, or else an earlier index."""
        kept: dict[str, str] = {}
        with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged index: its shards are encoded again
            kept = {shard["file"]: shard["sha256"] for shard in read_json(self.out / INDEX)["shards"]}
        for path in self.out.glob(f"latents-*{CHECKSUM}"):
            digest, _, name = path.read_text(errors="replace").strip().partition("  ")
            kept[name] = digest
        return kept

    def _encoded(self, numbers: range) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors of a shard, and the images that could not be read."""
        broken: list[str] = []
        parts: dict[str, list[Tensor]] = {}
        labels: list[int] = []
        for images in batched(self._readable(numbers, labels, broken), self.batch_size):
            for name, batch in {"": images, "mirrored_": images.flip(3)}.items():
                if name and not self.mirrored:
                    continue
                posterior = self.vae.encode(batch.to(self.vae.device, self.vae.dtype)).latent_dist
                parts.setdefault(f"{name}mean", []).append(posterior.mean.half().cpu())
                parts.setdefault(f"{name}std", []).append(posterior.std.half().cpu())
        # Contiguous: after attention an autoencoder has channels last, which safetensors does not save.
        tensors = {name: torch.cat(some).contiguous() for name, some in parts.items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            which = f"images {numbers[0]} to {numbers[-1]}"
            raise ValueError(
                f"the latents of {which} are not finite in float16: take --dtype float32, or another --vae"
            )
        return {**(tensors or self._nothing()), "labels": torch.tensor(labels, dtype=torch.int64)}, broken

    def _nothing(self) -> dict[str, Tensor]:
        """The tensors of a shard of which no image could be read."""
        side = self.size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        names = ("mean", "std", *(("mirrored_mean", "mirrored_std") if self.mirrored else ()))
        return {name: torch.zeros(0, self.vae.config.latent_channels, side, side).half() for name in names}

    def _readable(self, numbers: range, labels: list[int], broken: list[str]) -> Iterator[Tensor]:
        for index in numbers:
            try:
                image, label = self.source.load(index)
            except BrokenImage as error:
                broken.append(str(error))
                continue
            labels.append(label)
            image = image.convert("L" if self.vae.config.in_channels == 1 else "RGB")
            yield pixels(central(image, self.size)).float() / 127.5 - 1


def batched(images: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Images (C, H, W) as batches (B, C, H, W)."""
    batch: list[Tensor] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)
