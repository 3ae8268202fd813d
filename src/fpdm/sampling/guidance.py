"""Classifier-free guidance (Ho and Salimans 2022): the prediction for a class, away from the one for none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

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
        if not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            raise ValueError(f"guidance_scale is {self.scale!r}; it must be a finite number, 1 for none")
        ends = [end for end in self.interval if isinstance(end, Real)]
        if len(self.interval) != 2 or len(ends) != 2 or not 0 <= ends[0] <= ends[1]:
            raise ValueError(f"guidance_interval is {self.interval}; it must be two timesteps, the lower one first")
        if self.channels is not None and (not isinstance(self.channels, Integral) or self.channels < 1):
            raise ValueError(f"guidance_channels is {self.channels!r}; it must be an integer of at least 1, or None")
        if not isinstance(self.share, Real) or not 0 < self.share <= 1:
            raise ValueError(f"guidance_share is {self.share!r}; it must lie in (0, 1], 1 for as many iterations")
        if self.scale == 1 and (self.channels is not None or self.share != 1 or self.interval != (0, math.inf)):
            raise ValueError("there is no guidance at guidance_scale 1: leave its interval, channels and share out")

    def at(self, t: int) -> bool:
        """Whether to guide at a timestep."""
        return self.scale != 1 and self.interval[0] <= t <= self.interval[1]

    def check(self, timesteps: Sequence[int]) -> None:
        """Raises ValueError if there is guidance, and at none of these timesteps."""
        if self.scale != 1 and not any(map(self.at, timesteps)):
            raise ValueError(
                f"guidance_interval is {self.interval}, and none of the {len(timesteps)} timesteps from {timesteps[0]} "
                f"to {timesteps[-1]} lies in it: name training timesteps, not shares of them"
            )

    def iterations(self, conditional: int) -> int:
        """The unconditional evaluation's iterations, at least 1."""
        return max(1, math.floor(self.share * conditional + 0.5))

    def combined(self, output: Tensor, channels: int) -> Tensor:
        """The guided output (B, C or 2C, H, W) from both halves (2B, C or 2C, H, W), conditional first, of a prediction
        of `channels` C. What is not guided, the variance above all, is the conditional half's."""
        conditional, unconditional = output.chunk(2)
        guided = min(channels, self.channels or channels)
        moved = torch.lerp(unconditional[:, :guided], conditional[:, :guided], float(self.scale))
        return torch.cat([moved, conditional[:, guided:]], dim=1)
