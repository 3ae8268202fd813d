"""A step of a run looked at again: which images it saw, at which timesteps, and what each of them costs."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from fpdm.data import Slots, Stream, image_of
from fpdm.files import read_json
from fpdm.training import checkpoints
from fpdm.training.build import Parts, build, load_pretrained
from fpdm.training.config import Config


@dataclass(frozen=True)
class Row:
    """One image of the step: its place in the batch, class, timestep, and loss with the weights of a checkpoint."""

    slot: int
    label: int
    timestep: int
    loss: float
    mse: float


@dataclass(frozen=True)
class Replay:
    """A step again. `weights` is the step of the checkpoint that was used, None for the weights at the start."""

    rows: list[Row]
    images: list[Image.Image]
    broken: list[str]
    weights: int | None


def replay(run: Path, step: int, data: str | None = None) -> Replay:
    """Step number `step` (from 0) of the run in a folder, with the weights of its newest checkpoint up to there.

    data  where the images are now, if they have moved

    Raises ValueError for a folder that is no run, a step that it does not have, other images, or a model to fine-tune
    that is gone where the weights at the start are asked for.
    """
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is not a run: it has no config.json")
    kept = read_json(run / "config.json")
    config = Config.from_dict(kept).with_fields(device="cpu", **({} if data is None else {"data": data}))
    if not 0 <= step < config.optimizer.steps:
        raise ValueError(f"step {step} is none of this run's, 0 to {config.optimizer.steps - 1}")
    parts = build(config.with_fields(init_from=None))
    if parts.source.fingerprint != kept.get("data_fingerprint"):
        place = config.data.data or config.data.source
        raise ValueError(f"the images in {place} are not those of the run: say with --data where those are")
    found = checkpoints.newest(run / "checkpoints", print, most=step)
    weights = None
    if found is not None:
        tensors, state = found
        parts.model.load_state_dict(tensors["weights"])
        weights = state["step"]
    elif config.run.init_from is not None:
        begin(parts, config.run.init_from)
    return _replayed(parts, step, weights)


def begin(parts: Parts, folder: str) -> None:
    """Give the network the weights that the run began with. Raises ValueError if that model is gone."""
    try:
        load_pretrained(parts.model, folder, parts.source, parts.vae)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(error).rstrip('.')}. The run began with the model {folder}, and this step is before its oldest "
            "checkpoint: put the model back, or take a later step"
        ) from error


@torch.no_grad()
def _replayed(parts: Parts, step: int, weights: int | None) -> Replay:
    config, model = parts.config, parts.model.eval()
    stream = Stream(parts.source, parts.prepare, batch_size=config.optimizer.batch_size, seed=config.run.seed)
    rows, images, broken = [], [], []
    for keys in Slots(step, step + 1, config.optimizer.batch_size, config.optimizer.accumulation):
        batch, chance = parts.drawing([stream[key] for key in keys])
        if batch.failure is not None:
            raise ValueError(batch.failure)
        course = parts.course(step)
        labels = parts.labels(batch.labels, chance.dropped)
        t = chance.timesteps
        x_t, solving = parts.loss.noisy(batch.images, chance.noise, t), {}
        if course is not None:
            solving = {"solve": course.solve, "init": parts.start(model, course, chance, x_t, t, labels)}
        loss = parts.loss(model(x_t, t, labels, **solving).sample, batch.images, chance.noise, t)
        columns = (batch.slots, batch.labels, t, loss.total, loss.mse)
        rows += [Row(int(s), int(y), int(at), float(a), float(b)) for s, y, at, a, b in zip(*columns, strict=True)]
        images += [shown(parts, image) for image in batch.images]
        broken += batch.broken
    return Replay(rows, images, broken, weights)


def shown(parts: Parts, image: torch.Tensor) -> Image.Image:
    """What the network takes (C, H, W) as an image; a latent decoded."""
    if parts.vae is not None:
        config = parts.vae.config
        latent = image[None] / config.scaling_factor + (config.get("shift_factor") or 0.0)
        image = parts.vae.decode(latent.to(parts.vae.dtype)).sample[0].float()
    return image_of(((image.clamp(-1, 1) + 1) * 127.5).round().byte())
