"""Training: config, loop, checkpoints. `Config` needs no torch; `Trainer` is imported where it is used."""

from fpdm.training.config import Config

__all__ = ["Config"]
