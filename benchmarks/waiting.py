"""How long a training waits for its data: a part of performance.py."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL
from drawing import Row
from PIL import Image

from fpdm.data import Slots, Stream, loader, open_images
from fpdm.data.encoding import Encoder, described
from fpdm.recipes import recipe
from fpdm.training.loop import Trainer

PICTURES, SIDE = 256, 256
MANY, ENOUGH = 10**6, 2.0  # steps that a loader is ready for, and seconds of them that are timed
TRAININGS: dict[str, dict[str, Any]] = {
    "arrays in memory, 8 x 8": {"recipe": "digits", "steps": 200, "log_every": 100},
    "JPEG, 256 x 256, to 64 x 64": {"recipe": "images", "model": "S/8", "batch_size": 8, "steps": 12, "log_every": 6},
    "cached latents, 32 x 32 x 4": {
        "recipe": "imagenet256", "classes": 0, "model": "S/4", "batch_size": 8, "mixed_precision": "no",
        "steps": 12, "log_every": 6, "validate_every": MANY, "holdout": 0,
    },
}  # fmt: skip
ON_A_GPU = {"batch_size": 32, "steps": 60, "log_every": 30}
AS_ON_A_GPU = {"cached latents, 32 x 32 x 4": {**ON_A_GPU, "model": "XL/2", "mixed_precision": "bf16"}}


@contextmanager
def pictures() -> Iterator[dict[str, str]]:
    """Folders of JPEG files, smooth ones, and of their latents by an autoencoder of random weights."""
    with TemporaryDirectory() as folder:
        jpeg, latents = Path(folder) / "pictures", Path(folder) / "latents"
        jpeg.mkdir()
        for i in range(PICTURES):
            coarse = torch.randint(256, (9, 9, 3), generator=torch.Generator().manual_seed(i)).byte()
            Image.fromarray(coarse.numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(jpeg / f"{i}.jpg")
        vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, sample_size=SIDE,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                            mid_block_add_attention=False)  # fmt: skip
        vae.save_pretrained(f"{folder}/vae")
        encoder = Encoder(open_images(jpeg), vae, described(vae, f"{folder}/vae"), latents, SIDE, mirrored=True)
        encoder.claim()
        encoder.run()
        encoder.finish()
        yield {"images": str(jpeg), "imagenet256": str(latents)}


def delivered(trainer: Trainer, workers: int) -> float:
    """Images per second that the loader of a training gives if nothing is done with them."""
    size = trainer.config.optimizer.batch_size
    stream = Stream(trainer.parts.source, trainer.parts.prepare, batch_size=size, seed=0)
    batches = iter(loader(stream, Slots(0, MANY, size), workers, False, trainer.parts.drawing))
    for _ in range(20):  # what workers had made before
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < ENOUGH:
        next(batches)
        count += size
    return count / (time.perf_counter() - began)


def waiting(device: str = "cpu") -> list[Row]:
    """Trainings that read their data in the process itself and by a worker: of the last half of their steps."""
    rows = []
    with pictures() as places, TemporaryDirectory() as folder:
        for name, settings in TRAININGS.items():
            changes = {**settings, **(AS_ON_A_GPU.get(name, ON_A_GPU) if device == "cuda" else {})}
            config = recipe(changes.pop("recipe"))
            data = places.get(settings["recipe"])
            config = config.with_fields(**changes, data=data, device=device, sample_every=MANY, checkpoint_every=MANY)
            for workers in (0, 1):
                path = Path(folder) / f"{settings['recipe']}-{workers}"
                trainer = Trainer(config.with_fields(workers=workers), path)
                trainer.run()
                line = json.loads((path / "log.jsonl").read_text().splitlines()[-1])
                rows.append({
                    "data": name, "workers": workers, "model": changes.get("model", settings["recipe"]),
                    "trained": line["images_per_second"], "waited": line["share_waiting_for_data"],
                    "delivered": delivered(trainer, workers),
                })  # fmt: skip
    return rows
