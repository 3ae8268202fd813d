"""What is learned: noise schedules, prediction types, losses."""

from fpdm.diffusion.losses import DiffusionLoss, Loss
from fpdm.diffusion.predictions import add_noise, predicted_x0, target
from fpdm.diffusion.schedule import BETA_SCHEDULES, PREDICTION_TYPES, for_sampling, make_schedule

__all__ = [
    "BETA_SCHEDULES",
    "PREDICTION_TYPES",
    "DiffusionLoss",
    "Loss",
    "add_noise",
    "for_sampling",
    "make_schedule",
    "predicted_x0",
    "target",
]
