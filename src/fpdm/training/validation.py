"""What a run looks at now and then: the loss on images kept out of training, and whether the core contracts.

Images, noise and timesteps are the same at every look and in every run of the seed, so the numbers of one run, and
those of runs with the same data, can be compared. The averaged weights are looked at: they are what is saved.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fpdm.data import BrokenImage, Source
from fpdm.data.stream import Prepare
from fpdm.diffusion import DiffusionLoss
from fpdm.fixedpoint import FixedIterations, Solve
from fpdm.keyed import generator
from fpdm.models import Denoiser, FixedPointDiT

BUCKETS = 10  # of the timesteps, from nearly clean to nearly noise
PROBED = 12  # iterations whose residuals are looked at
PROBES = 16  # images whose residuals are


class Subset:
    """Some of the images of a source, by their numbers. Its fingerprint is the whole's: the numbers follow from it and
    from settings that a run keeps."""

    def __init__(self, source: Source, numbers: list[int]):
        self.source, self.numbers = source, numbers
        self.class_names, self.channels, self.fingerprint = source.class_names, source.channels, source.fingerprint
        self.labels = [int(source.labels[n]) for n in numbers]
        ends = torch.tensor(source.chunks).cumsum(0)
        places = torch.bucketize(torch.tensor(numbers), ends, right=True)
        self.chunks = tuple(n for n in places.bincount(minlength=len(ends)).tolist() if n)

    def __len__(self) -> int:
        return len(self.numbers)

    def load(self, index: int) -> tuple[object, int]:
        return self.source.load(self.numbers[index])


def split(source: Source, holdout: int, seed: int) -> tuple[Source, Source | None]:
    """The images to train on, and `holdout` others, drawn by the seed.

    Raises ValueError if that leaves fewer to train on than it takes away.
    """
    if not holdout:
        return source, None
    if 2 * holdout > len(source):
        raise ValueError(f"holdout is {holdout}; at most half of the {len(source)} images can be kept out of training")
    order = torch.randperm(len(source), generator=generator(seed, "holdout")).tolist()
    return Subset(source, sorted(order[holdout:])), Subset(source, sorted(order[:holdout]))


@dataclass(frozen=True)
class Look:
    """What was seen.

    loss       mean squared error of the prediction over the held-out images; None without any
    buckets    the same by timestep, ten ranges of equal width, cleanest first; None for one without images
    residuals  |f(z) - z| / |f(z)| by iteration, medians over images of all timesteps; empty for an explicit network
    """

    loss: float | None
    buckets: list[float | None]
    residuals: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Validation:
    """A run's looks at itself.

    held        the images kept out of training; without any, only residuals are looked at, on images of the training
    iterations  of the fixed point, for the loss
    broken      what is said of held-out images that cannot be read
    """

    def __init__(
        self, source: Source, held: Source | None, prepare: Prepare, loss: DiffusionLoss, seed: int, iterations: int
    ):
        self.held, self.loss, self.iterations = held, loss, iterations
        images, labels, broken = loaded(held or source, prepare, seed, len(held) if held else PROBES)
        self.images, self.labels = images, labels
        self.broken = broken if held else []  # training names others
        count = len(images)
        # Every bucket alike, and every image at one timestep.
        places = (torch.arange(count) + 0.5) / max(1, count)
        self.timesteps = (places * loss.num_timesteps).long()[torch.randperm(count, generator=generator(seed, "t"))]
        self.noise = torch.randn(images.shape, generator=generator(seed, "validation noise"))

    @torch.no_grad()
    def look(self, model: Denoiser, batch_size: int, device: torch.device) -> Look:
        """`model` is one whose weights are whole on this process."""
        errors = []
        for start in range(0, len(self.images) if self.held else 0, batch_size):
            x_t, t, y, x0, noise = self._batch(slice(start, start + batch_size), model, device)
            counts = {"iterations": self.iterations} if isinstance(model, FixedPointDiT) else {}
            errors.append(self.loss(model(x_t, t, y, **counts).sample.float(), x0, noise, t).mse)
        found = torch.cat(errors).cpu() if errors else torch.empty(0)
        bucket = self.timesteps * BUCKETS // self.loss.num_timesteps
        means = (
            [float(found[bucket == b].mean()) if (bucket == b).any() else None for b in range(BUCKETS)]
            if errors
            else []
        )
        return Look(float(found.mean()) if errors else None, means, self._residuals(model, device))

    def _residuals(self, model: Denoiser, device: torch.device) -> list[float]:
        if not isinstance(model, FixedPointDiT) or not len(self.images):
            return []
        x_t, t, y, *_ = self._batch(slice(0, PROBES), model, device)
        solution = model(x_t, t, y, solve=Solve(stopping=FixedIterations(PROBED))).solution
        assert solution is not None
        return solution.residuals.median(1).values.tolist()

    def _batch(self, rows: slice, model: Denoiser, device: torch.device) -> tuple[Tensor, ...]:
        x0, noise, t, y = (v[rows].to(device) for v in (self.images, self.noise, self.timesteps, self.labels))
        y = y if model.config.num_classes else torch.zeros_like(y)
        return self.loss.noisy(x0, noise, t), t, y, x0, noise


def loaded(source: Source, prepare: Prepare, seed: int, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """The first `count` images that can be read, as a network takes them (B, C, H, W), their labels (B,), and what is
    said of those that cannot."""
    images: list[Tensor] = []
    labels: list[int] = []
    broken: list[str] = []
    for index in range(len(source)):
        if len(images) == count:
            break
        try:
            image, label = source.load(index)
        except BrokenImage as error:
            broken.append(str(error))
            continue
        images.append(prepare(image, generator(seed, "validation", index)))
        labels.append(label)
    found = torch.stack(images) if images else torch.empty(0)
    return found, torch.tensor(labels, dtype=torch.int64), broken
