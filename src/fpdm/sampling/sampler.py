"""Model + scheduler + plan -> images and a report.

A sampling is a generator, its course: it yields the evaluations of the network that it needs, one per timestep, and is
sent what comes of them. `sample` answers one course; `continuous` answers many at once. Nothing is kept between calls:
what is carried over from timestep to timestep is in local variables, the scheduler is built anew, and every random
number comes from the generator of its image.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fpdm.fixedpoint import Picard, Solution, Solve, Solver
from fpdm.keyed import generator
from fpdm.models import Denoiser, Output
from fpdm.sampling.budget import Plan
from fpdm.sampling.guidance import Guidance
from fpdm.sampling.operations import cost_of, operations_of
from fpdm.sampling.report import Report, report_of
from fpdm.sampling.reuse import Carry
from fpdm.sampling.schedulers import Stepper
from fpdm.sampling.spending import Purse

PICARD, NO_GUIDANCE = Picard(), Guidance()
OnStep = Callable[[int, int, Tensor], Tensor | None]
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Call:
    """An evaluation of the network that a course waits for.

    x      (rows, C, H, W), rows being the images, or twice them where they are guided
    t      the timestep
    y      (rows,) classes
    solve  how the fixed point is to be found; None for a network without one
    init   (rows, N, D) where it starts, None for the network's own start
    """

    model: Denoiser
    x: Tensor
    t: int
    y: Tensor
    solve: Solve | None = None
    init: Tensor | None = None

    def answer(self) -> Output:
        return self.model(self.x, self.t, self.y, solve=self.solve, init=self.init)  # type: ignore[no-any-return]


Course = Generator[Call, Output, tuple[Tensor, Report]]


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, keyed by seed and image index: an image does not depend on its batch."""
    return [generator("image", seed, index) for index in indices]


def initial_noise(model: Denoiser, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise (B, C, H, W) float32 on the CPU, each image from its own generator."""
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    # Named, as torch's defaults may be others.
    return torch.stack([torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in generators])


def course(
    model: Denoiser,
    template: Any,
    plan: Plan,
    noise: Tensor,
    labels: Tensor | None,
    generators: Sequence[torch.Generator],
    *,
    scheduler: str | None = None,
    solver: Solver = PICARD,
    tolerance: float | None = None,
    pooled: bool = False,
    reuse: str = "plain",
    guidance: Guidance = NO_GUIDANCE,
    on_step: OnStep | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Course:
    """The course of images (B, C, H, W) float32 from `noise` of that shape, of classes `labels` (B,) or none.
    It returns them and their report. Nothing in it is to have a gradient, which is up to who answers.

    template    a diffusers scheduler, of which a fresh one of kind `scheduler` is made
    plan        iterations per timestep; spent exactly, or at most under a tolerance
    generators  one per image, for what a stochastic scheduler draws
    tolerance   relative residual at which an image's solve stops; for what is left over, and `pooled`, see `Purse`
    reuse       what a solve starts from: see `Carry`
    on_step     called with (index, timestep, x) after each timestep; may return an x to go on with
    interrupted asked after each timestep: if so, what there is by then is all that is returned and reported
    """
    stepper = Stepper(template, scheduler, plan.num_steps, model.config.learned_variance)
    costs = cost_of(model), operations_of(model)  # before the clock starts: a network is counted when it is first met
    x, started = noise.float(), time.perf_counter()
    y = torch.full((len(x),), model.null_class, device=x.device) if labels is None else labels.to(x.device)
    null = torch.full_like(y, model.null_class)
    carry, purse = Carry(reuse), Purse(len(x), tolerance, pooled)
    solutions: list[Solution | None] = []

    for index, (t, iterations) in enumerate(zip(stepper.timesteps, plan.iterations, strict=True)):
        guided, level = guidance.at(t), stepper.level(index)
        inputs, classes = (torch.cat([x, x]), torch.cat([y, null])) if guided else (x, y)
        if iterations is None:
            output = yield Call(model, inputs, t, classes)
        else:
            solve = Solve(stopping=purse.stopping(iterations, guidance, guided), solver=solver)
            output = yield Call(model, inputs, t, classes, solve, carry.start(level, len(inputs)))
            assert output.solution is not None
            carry.add(level, output.solution.value)
            if tolerance is not None:
                purse.spend(iterations, guidance, guided, output.solution.iterations.tolist())
        # Without its value, which of all timesteps together would fill the memory.
        solutions.append(output.solution and replace(output.solution, value=x.new_empty(0)))
        prediction = output.sample.float()
        prediction = guidance.combined(prediction, x.shape[1]) if guided else prediction
        x = stepper.step(prediction, index, x, list(generators))
        if on_step is not None:
            made = x.clone()  # which a callback may change in its place
            if (replaced := on_step(index, t, x)) is not None:
                x = stepper.replaced(made, replaced)
        if interrupted():
            plan = plan.first(index + 1)
            break

    x.flatten()[:1].tolist()  # so that the clock is read when it is there, on a device that works by itself, too
    seconds = time.perf_counter() - started
    timesteps = stepper.timesteps[: plan.num_steps]
    guided_at = [guidance.at(t) for t in timesteps]
    return x, report_of(plan, *costs, timesteps, solutions, x, guided_at, purse, seconds)


def answered(begin: Callable[P, Generator[Call, Output, R]]) -> Callable[P, R]:
    """The function that runs a course to its end, each call by itself."""

    @torch.no_grad()
    @wraps(begin)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        running = begin(*args, **kwargs)
        try:
            call = next(running)
            while True:
                call = running.send(call.answer())
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]

    return run


sample = answered(course)
