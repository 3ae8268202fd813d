"""Model + scheduler + plan -> images and a report.

Nothing is kept between calls: the warm start travels in a local variable, the scheduler is built anew, and every random
number comes from the generator of its image.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fpdm.keyed import generator
from fpdm.models import Denoiser, DiT
from fpdm.sampling.budget import Cost, Plan
from fpdm.sampling.report import Report
from fpdm.sampling.schedulers import Stepper

OnStep = Callable[[int, int, Tensor], Tensor | None]


def cost_of(model: Denoiser) -> Cost:
    """The block passes of one call of `model`."""
    if isinstance(model, DiT):
        return Cost(model.passes(), 0)
    one, two = model.passes(1), model.passes(2)
    return Cost(one - (two - one), two - one)


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, keyed by seed and image index: an image does not depend on its batch."""
    return [generator("image", seed, index) for index in indices]


def initial_noise(model: Denoiser, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise (B, C, H, W) float32 on the CPU, each image from its own generator."""
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


@torch.no_grad()
def sample(
    model: Denoiser,
    template: Any,
    plan: Plan,
    noise: Tensor,
    labels: Tensor | None,
    generators: Sequence[torch.Generator],
    *,
    scheduler: str | None = None,
    reuse: bool = True,
    guidance_scale: float = 1.0,
    on_step: OnStep | None = None,
) -> tuple[Tensor, Report]:
    """Draw images (B, C, H, W) float32 from `noise` of that shape, of classes `labels` (B,) or none.

    template        a diffusers scheduler, of which a fresh one of kind `scheduler` is made
    plan            iterations per timestep; spent exactly
    generators      one per image, for what a stochastic scheduler draws
    reuse           start each solve from the solution at the timestep before
    guidance_scale  1 for none (Ho and Salimans 2022); all channels of the prediction are guided, the variance is not
    on_step         called with (index, timestep, x) after each timestep; may return an x to go on with
    """
    guided = guidance_scale != 1.0
    stepper = Stepper(template, scheduler, plan.num_steps, model.config.learned_variance)
    x, started = noise.float(), time.perf_counter()
    y = torch.full((len(x),), model.null_class, device=x.device) if labels is None else labels.to(x.device)
    if guided:
        y = torch.cat([y, torch.full_like(y, model.null_class)])
    init, solutions = None, []

    for index, (t, iterations) in enumerate(zip(stepper.timesteps, plan.iterations, strict=True)):
        inputs = torch.cat([x, x]) if guided else x
        counts = {} if iterations is None else {"iterations": iterations, "init": init}
        output = model(inputs, t, y, **counts)
        solutions.append(output.solution)
        if reuse and output.solution is not None:
            init = output.solution.value
        prediction = _guide(output.sample.float(), x.shape[1], guidance_scale) if guided else output.sample.float()
        x = stepper.step(prediction, index, x, list(generators))
        if on_step is not None and (replaced := on_step(index, t, x)) is not None:
            x = replaced

    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return x, _report(model, plan, stepper.timesteps, solutions, x, guided, time.perf_counter() - started)


def _guide(output: Tensor, channels: int, scale: float) -> Tensor:
    """Classifier-free guidance of the prediction; the variance's channels are the conditional ones."""
    conditional, unconditional = output.chunk(2)
    guided = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale)
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def _report(
    model: Denoiser, plan: Plan, timesteps: list[int], solutions: list[Any], x: Tensor, guided: bool, seconds: float
) -> Report:
    cost, images = cost_of(model), len(x)
    if plan.iterations[0] is None:
        spent, residuals = cost.fixed * len(solutions), []
    else:
        iterations = torch.stack([solution.iterations[:images] for solution in solutions]).cpu()  # (T, B)
        per_image = (cost.fixed + cost.per_iteration * iterations).sum(0)
        assert (per_image == plan.planned).all(), f"planned {plan.planned} block passes, spent {per_image.tolist()}"
        spent = int(per_image[0])
        residuals = [_mean_of_finite(solution.residuals) for solution in solutions]
    assert spent == plan.planned, f"planned {plan.planned} block passes, spent {spent}"
    return Report(
        images=images,
        asked=plan.asked,
        planned=plan.planned,
        spent=spent,
        total_passes=spent * (2 if guided else 1),
        timesteps=timesteps,
        iterations=list(plan.iterations),
        residuals=residuals,
        diverged=int((~x.isfinite().flatten(1).all(1)).sum()),
        seconds=seconds,
    )


def _mean_of_finite(residuals: Tensor) -> list[float]:
    """The mean residual of each iteration, (iterations, B) -> (iterations,), over the images that had not diverged: one
    must not hide the others, and JSON knows no NaN. 0 where all had; the report counts those."""
    finite = residuals.isfinite()
    return (residuals.masked_fill(~finite, 0).sum(1) / finite.sum(1).clamp_min(1)).tolist()
