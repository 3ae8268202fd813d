"""What a training step asks of a fixed point network, drawn once per step and alike on all processes."""

from dataclasses import dataclass, replace

import torch

from fpdm.fixedpoint import (
    FixedIterations,
    Gradient,
    Implicit,
    MultiStepJacobianFree,
    Phantom,
    Solve,
    StochasticJacobianFree,
    Unroll,
)
from fpdm.keyed import generator
from fpdm.models import Denoiser
from fpdm.sampling import operations_of
from fpdm.training.config import GradientConfig

IMPLICIT_LIMIT = 30  # iterations of its backward solve


@dataclass(frozen=True)
class Course:
    """One step.

    solve  of the timesteps that are trained; it names the exit, if there is one
    warm   the solve at noisier timesteps, without gradient, whose solution the other one starts from; None starts cold
    """

    solve: Solve
    warm: Solve | None = None


@dataclass(frozen=True)
class Courses:
    """All steps.

    stopping    of the iterations without gradient, where the method has no count of its own
    exits       whether an earlier iterate is decoded as well: one with a gradient where there is one
    warm_share  of the steps that start warm (latent self-conditioning, Jabri et al. 2023, for a fixed point). Their
                iterations without gradient are made at the noisier timesteps; the implicit method, which needs a
                solution, makes as many at its own besides
    """

    gradient: Gradient
    stopping: FixedIterations
    exits: bool = False
    warm_share: float = 0.0

    def of(self, seed: int, step: int) -> Course:
        """A step of the training with a seed; the same on all processes."""
        return self.draw(generator(seed, "iterations", step))

    def draw(self, generator: torch.Generator) -> Course:
        """The step whose choices `generator` makes."""
        solve = Solve(stopping=self.stopping, gradient=self.gradient.draw(generator))
        warm = None
        if self.warm_share and float(torch.rand((), generator=generator)) < self.warm_share:
            begun = differentiated(solve)[0] - 1
            warm = Solve(stopping=FixedIterations(max(1, begun)))
            solve = after(solve)
        if self.exits:
            later = differentiated(solve)
            earlier = later[:-1] or range(1, later[-1])
            if earlier:
                place = int(torch.randint(len(earlier), (), generator=generator))
                solve = replace(solve, exits=(earlier[place],))
        return Course(solve, warm)


def differentiated(solve: Solve) -> range:
    """The iterates of a solve, from 1 to its last, that have a gradient."""
    return solve.gradient.differentiated(most(solve))


def operations(model: Denoiser, solve: Solve | None = None, warm: Solve | None = None) -> float:
    """Operations per image of a training step, a backward pass counting as two forward ones; without the decoding of an
    early exit, what checkpointing computes again, and the backward solve of the implicit method.

    solve, warm  of a fixed point network
    """
    cost = operations_of(model)
    if solve is None:
        return 3 * cost.fixed
    some = differentiated(solve)
    begun = 0 if warm is None else cost.passes(most(warm))
    return 3 * cost.passes(len(some)) + cost.per_iteration * (some[0] - 1) + begun


def most(solve: Solve) -> int:
    """The most iterations that the stopping rule of a solve allows any sample."""
    limit = solve.stopping.limit
    assert isinstance(limit, int)
    return limit


def after(solve: Solve) -> Solve:
    """What is left of a solve after a warm start: no fixed number of iterations without gradient."""
    if isinstance(solve.gradient, MultiStepJacobianFree):
        solve = replace(solve, gradient=replace(solve.gradient, no_grad=0))
    return solve if isinstance(solve.gradient, Implicit) else replace(solve, stopping=FixedIterations(0))


def make_courses(config: GradientConfig, num_core: int) -> Courses:
    """The courses of a config for a shared group of `num_core` blocks, by which the counts are divided.

    Raises ValueError for counts, damping or tolerance out of range.
    """
    ranges = StochasticJacobianFree((0, config.no_grad_max), (1, config.with_grad_max)).for_group(num_core)
    n, m = ranges.no_grad[1], ranges.with_grad[1]
    gradient: Gradient = ranges
    match config.gradient:
        case "jfb":
            gradient = MultiStepJacobianFree(n, 1)
        case "multistep":
            gradient = MultiStepJacobianFree(n, m)
        case "phantom":
            gradient = Phantom(m, config.damping)
        case "implicit":
            gradient = Implicit(tolerance=config.tolerance, max_iterations=IMPLICIT_LIMIT)
        case "unroll":
            gradient = Unroll(m)
    return Courses(gradient, FixedIterations(n), config.exit_loss != "none", config.warm_share)


def mean_operations(model: Denoiser, courses: Courses | None, draws: int = 500) -> float:
    """Operations per image of a training step, on average over `draws` of its courses; see `operations`."""
    if courses is None:
        return operations(model)
    drawn = [courses.draw(generator("mean operations", i)) for i in range(draws)]
    return sum(operations(model, course.solve, course.warm) for course in drawn) / draws
