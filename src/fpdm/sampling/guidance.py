"""Classifier-free guidance (Ho and Salimans 2022): the prediction for a class, away from the one for none."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How far the prediction is moved from the unconditional one, and where.

    scale     1 for none: the network is then evaluated once instead of twice; above it away from the unconditional
              prediction, 0 that prediction itself
    interval  the training timesteps, both ends included, at which to guide (Kynkaanniemi et al. 2024); elsewhere the
              network is evaluated once
    channels  how many channels of the prediction are guided; None for all. Published results of DiT guide three of four
    share     the iterations that the unconditional evaluation spends, as a share of the conditional one's: in (0, 1]

    Raises ValueError for values outside these ranges.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0, math.inf)
    channels: int | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance_scale is {self.scale}; it must be finite, 1 for none")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1]:
            raise ValueError(f"guidance_interval is {self.interval}; it must be two timesteps, the lower one first")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance_channels is {self.channels}; it must be at least 1, or None for all")
        if not 0 < self.share <= 1:
            raise ValueError(f"guidance_share is {self.share}; it must lie in (0, 1], 1 for as many iterations")
        if self.scale == 1 and (self.channels is not None or self.share != 1 or self.interval != (0, math.inf)):
            raise ValueError("there is no guidance at guidance_scale 1: leave its interval, channels and share out")

    def at(self, t: int) -> bool:
        """Whether to guide at a timestep."""
        return self.scale != 1 and self.interval[0] <= t <= self.interval[1]

    def iterations(self, conditional: int) -> int:
        """The unconditional evaluation's iterations, at least 1."""
        return max(1, math.floor(self.share * conditional + 0.5))

    def combined(self, output: Tensor, channels: int) -> Tensor:
        """The guided output (B, C or 2C, H, W) from both halves (2B, C or 2C, H, W), conditional first, of a prediction
        of `channels` C. What is not guided, the variance above all, is the conditional half's."""
        conditional, unconditional = output.chunk(2)
        guided = min(channels, self.channels or channels)
        moved = torch.lerp(unconditional[:, :guided], conditional[:, :guided], self.scale)
        return torch.cat([moved, conditional[:, guided:]], dim=1)
