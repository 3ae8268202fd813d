"""A run in miniature, before the data is there: all of it is built, at a reduced width, and one step is taken."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fpdm.data import Latent
from fpdm.keyed import generator
from fpdm.models.presets import preset
from fpdm.training.config import Config
from fpdm.training.devices import tracker_of
from fpdm.training.loop import Trainer

IMAGES = 8  # in the step, of each process and part


class RandomLatents:
    """Latents, or pixels, of the shape that a config names, that mean nothing; of as many classes as it names."""

    def __init__(self, config: Config, count: int):
        data = config.data
        self.shape = (data.channels, data.image_size, data.image_size)
        self.channels, self.fingerprint = data.channels, "random"
        self.chunks: tuple[int, ...] = (count,)
        self.class_names = [str(label) for label in range(data.classes or 0)]
        self.labels = [i % max(1, len(self.class_names)) for i in range(count)]

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Latent, int]:
        mean = torch.randn(self.shape, generator=generator("random latent", index))
        return Latent(mean, torch.full(self.shape, 0.1)), self.labels[index]


def reduced(config: Config) -> Config:
    """`config` with the narrowest network that has its depth and heads, for one small step."""
    heads = config.model.num_heads or (preset(config.model.model)["num_heads"] if config.model.model else 4)
    return config.with_fields(
        hidden_size=8 * heads,
        num_heads=heads,
        batch_size=IMAGES * config.optimizer.accumulation * int(os.environ.get("WORLD_SIZE", "1")),
        steps=1, log_every=1, checkpoint_every=1, validate_every=2, sample_every=2, keep_checkpoints=1,
        holdout=0, workers=0, init_from=None, flip=False, tracker="none",
    )  # fmt: skip


def dry_run(config: Config) -> tuple[Config, float]:
    """Take one step of `config`, reduced, in a folder that is gone afterwards: what was run, and its seconds.

    Raises ValueError or ImportError for what a run would be refused for, but for its data.
    """
    tracker_of(config)
    small = reduced(config)
    with TemporaryDirectory() as folder:
        trainer = Trainer(small, Path(folder) / "dry", RandomLatents(small, 4 * small.optimizer.batch_size))
        trainer.run()
        return small, trainer.seconds
