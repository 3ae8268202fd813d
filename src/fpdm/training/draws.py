"""What is random in a training step, keyed so that it does not depend on devices, parts or resumption."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fpdm.data import Batch
from fpdm.data.stream import Item, collate
from fpdm.keyed import generator
from fpdm.training.course import Courses

FEW, MANY = 6, 100  # timesteps of the samplings whose steps a warm start imitates


@dataclass(frozen=True)
class Draws:
    """Of the images of a micro-batch, B of them.

    noise      (B, C, H, W) float32
    timesteps  (B,) int64
    dropped    (B,) bool: whose class is withheld

    and for a warm start

    later      (B,) int64, the noisier timestep, as far on as in samplings with 6 to 100 timesteps
    fresh      (B, C, H, W) float32, the noise that is added to get there; never `noise`, of which two shares would
               give the image away
    """

    noise: Tensor
    timesteps: Tensor
    dropped: Tensor
    later: Tensor | None = None
    fresh: Tensor | None = None

    def pin_memory(self) -> "Draws":
        """What a DataLoader asks for, so that copies to a GPU wait for nothing."""
        return replace(self, **{name: value.pin_memory() for name, value in vars(self).items() if value is not None})


def draw(
    seed: int,
    step: int,
    slots: list[int],
    shape: tuple[int, ...],
    num_timesteps: int,
    class_dropout: float,
    warm: bool = False,
) -> Draws:
    """The draws of the given slots of a step's batch; `shape` is an image's (C, H, W)."""
    rows = []
    for slot in slots:
        g = generator(seed, "sample", step, slot)
        t = torch.randint(num_timesteps, (), generator=g)
        dropped = torch.rand((), generator=g) < class_dropout
        row = [torch.randn(shape, generator=g), t, dropped]
        if warm:
            spacing = num_timesteps / FEW * math.exp(-float(torch.rand((), generator=g)) * math.log(MANY / FEW))
            row += [(t + round(spacing)).clamp_max(num_timesteps - 1), torch.randn(shape, generator=g)]
        rows.append(row)
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))


class Examples(NamedTuple):
    """A micro-batch, and what is random about it."""

    batch: Batch
    draws: Draws


@dataclass(frozen=True)
class Drawing:
    """What makes examples of images: the last that a loader does, in its workers where it has any.

    courses  of the training; None for an explicit network
    """

    seed: int
    num_timesteps: int
    class_dropout: float
    courses: Courses | None

    def __call__(self, items: list[Item]) -> Examples:
        return self.of(collate(items))

    def of(self, batch: Batch) -> Examples:
        """A batch with its draws."""
        warm = self.courses is not None and self.courses.of(self.seed, batch.step).warm is not None
        shape = tuple(batch.images.shape[1:])
        drawn = draw(self.seed, batch.step, batch.slots, shape, self.num_timesteps, self.class_dropout, warm)
        return Examples(batch, drawn)
