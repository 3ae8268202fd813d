"""Seconds that a plan will take on this machine, from a few calls of the network."""

import time
from dataclasses import dataclass
from statistics import median

import torch

from fpdm.fixedpoint import FixedIterations, Picard, Solve, Solver
from fpdm.models import Denoiser
from fpdm.sampling.budget import Plan
from fpdm.sampling.operations import cost_of

PICARD = Picard()
CALLS = 5  # of which the median counts
FEW, MANY = 1, 9  # iterations, whose times tell what a call and what an iteration takes


@dataclass(frozen=True)
class Seconds:
    """What a call of the network takes for a batch: `fixed` + `per_iteration` n."""

    batch_size: int
    fixed: float
    per_iteration: float

    def of(self, plan: Plan) -> float:
        """Seconds per image, without guidance."""
        iterations = sum(n or 0 for n in plan.iterations)
        return (plan.num_steps * self.fixed + iterations * self.per_iteration) / self.batch_size


@torch.no_grad()
def measure_seconds(model: Denoiser, batch_size: int, solver: Solver = PICARD) -> Seconds:
    """Time calls of `model` for a batch, after one that warms it up."""
    if cost_of(model).per_iteration == 0:
        return Seconds(batch_size, _timed(model, batch_size, {}), 0.0)
    solves = (Solve(solver=solver, stopping=FixedIterations(n)) for n in (FEW, MANY))
    few, many = (_timed(model, batch_size, {"solve": solve}) for solve in solves)
    per_iteration = max(0.0, (many - few) / (MANY - FEW))
    return Seconds(batch_size, max(0.0, few - FEW * per_iteration), per_iteration)


def _timed(model: Denoiser, batch_size: int, how: dict[str, Solve]) -> float:
    weight = next(model.parameters())
    shape = (batch_size, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    x = torch.zeros(shape, device=weight.device)
    y = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
    times = []
    for _ in range(CALLS + 1):
        started = time.perf_counter()
        output = model(x, 500, y, **how).sample
        output.flatten()[0].item()  # which waits for the device
        times.append(time.perf_counter() - started)
    return median(times[1:])
