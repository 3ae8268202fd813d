"""How fast the iterates of a trained network converge, by timestep."""

from contextlib import suppress
from typing import Any

import torch

from fpdm.data import BrokenImage, ImagePreparation, Source
from fpdm.diffusion import add_noise
from fpdm.fixedpoint import FixedIterations, Solve
from fpdm.keyed import generator
from fpdm.models import FixedPointDiT
from fpdm.pipeline import FixedPointDiTPipeline

IMAGES = 64
TIMESTEPS = (50, 150, 350, 550, 750, 950)
ITERATIONS = 24


@torch.no_grad()
def residuals_by_timestep(pipe: FixedPointDiTPipeline, source: Source) -> dict[str, Any]:
    """|f(z) - z| / |f(z)| by timestep and iteration, of images of `source` with noise added: medians over images. The
    solves start from u, the tokens after the pre blocks."""
    model, scheduler = pipe.transformer, pipe.scheduler
    assert isinstance(model, FixedPointDiT)
    prepare = ImagePreparation(model.config.sample_size)
    loaded = []
    for index in spread(len(source), IMAGES):
        with suppress(BrokenImage):
            loaded.append(source.load(index))
    images = torch.stack([prepare(image, generator("residuals", i)) for i, (image, _) in enumerate(loaded)])
    labels = torch.tensor([label if model.config.num_classes else 0 for _, label in loaded])
    noise = torch.randn(images.shape, generator=generator("residuals", "noise"))
    alpha_bar = (1 - scheduler.betas.double()).cumprod(0).float()  # `add_noise` of some schedulers counts from the end
    found = []
    for t in TIMESTEPS:
        x = add_noise(images, noise, alpha_bar[t])
        solution = model(x, t, labels, solve=Solve(stopping=FixedIterations(ITERATIONS))).solution
        found.append(solution.residuals.median(1).values.tolist())
    return {"images": len(images), "timesteps": list(TIMESTEPS), "residuals": found}


def spread(count: int, wanted: int) -> list[int]:
    """So many numbers below `count`, evenly apart: all if there are not so many."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]
