"""What is random in a training step, keyed so that it does not depend on devices, parts or resumption."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fpdm.keyed import generator


@dataclass(frozen=True)
class Draws:
    """noise (B, C, H, W) float32, timesteps (B,) int64, dropped (B,) bool: whose class is withheld."""

    noise: Tensor
    timesteps: Tensor
    dropped: Tensor


def draw(
    seed: int, step: int, slots: list[int], shape: tuple[int, ...], num_timesteps: int, class_dropout: float
) -> Draws:
    """The draws of the given slots of a step's batch; `shape` is an image's (C, H, W)."""
    noise, timesteps, dropped = [], [], []
    for slot in slots:
        g = generator(seed, "sample", step, slot)
        timesteps.append(torch.randint(num_timesteps, (), generator=g))
        dropped.append(torch.rand((), generator=g) < class_dropout)
        noise.append(torch.randn(shape, generator=g))
    return Draws(torch.stack(noise), torch.stack(timesteps), torch.stack(dropped))
