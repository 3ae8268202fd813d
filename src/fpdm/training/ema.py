"""The moving average of the weights, which is what is sampled from and saved."""

import copy

import torch

from fpdm.models import Denoiser
from fpdm.training.devices import mine


class Ema:
    """A copy of a network whose weights follow the original's: ema <- d ema + (1 - d) w.

    The decay d after s steps is min(decay, (1 + s) / (10 + s)), so that short runs are not averaged with their start.
    """

    def __init__(self, model: Denoiser, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Denoiser, step: int) -> None:
        """Move towards `model`, which has been trained for `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = ([mine(p) for p in network.parameters()] for network in (self.model, model))
        torch._foreach_lerp_(averages, weights, 1 - decay)
