"""How far a prediction is from the converged one, by noise level and iteration, and the plan that follows from it.

    e(t, n)  mean squared error of x0 after n iterations at timestep t, against x0 of the converged fixed point
    w(t)     its weight: the share of the step from t that x0 has, (1 - r)^2 with r = rho_s / rho_t, rho^2 = 1 / SNR and
             s the next timestep. In units of a clean image, a deterministic step is x_s = r x_t + (1 - r) x0.
             Heun's takes the mean of two directions (Karras et al. 2022, Algorithm 1): of x0 at s, where its second
             call is made from what the first gave, it has (1 / r - 1) / 2, and of x0 at t the rest

The plan minimises the sum of w(t) e(t, n_t) for a total number of iterations: exactly, by dynamic programming.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpdm.diffusion import predicted_x0
from fpdm.fixedpoint import FixedIterations, Solve
from fpdm.models import FixedPointDiT
from fpdm.sampling.reuse import Carry, angle
from fpdm.sampling.schedulers import Stepper

LEVELS = 20  # timesteps that are measured
MOST = 12  # iterations
CONVERGED = 3 * MOST
BETWEEN = 2  # iterations between measured timesteps, by which the warm start is as in short solves


@dataclass(frozen=True)
class Profile:
    """Measured errors.

    alpha_bar  (L,) noise levels, from noise to image
    errors     (L, N) mean squared error of x0 after 1 to N iterations
    """

    alpha_bar: np.ndarray
    errors: np.ndarray

    def at(self, alpha_bar: Sequence[float]) -> np.ndarray:
        """The errors (T, N) at other noise levels: interpolated, as logarithms, over the angle of the level."""
        known, wanted = ([angle(float(level)) for level in levels] for levels in (self.alpha_bar, alpha_bar))
        logs = np.log(np.maximum(self.errors, 1e-20))
        columns = [np.interp(wanted, known[::-1], column[::-1]) for column in logs.T]
        return np.exp(np.stack(columns, axis=1))

    def iterations(self, alpha_bar: Sequence[float], total: int) -> tuple[int, ...]:
        """The iterations at timesteps of these noise levels that sum to `total` and have the smallest weighted error.
        What N iterations each do not use up is spread evenly."""
        weighted = weights(alpha_bar)[:, None] * self.at(alpha_bar)
        steps, most = weighted.shape
        if total >= steps * most:
            return tuple((i + 1) * total // steps - i * total // steps for i in range(steps))
        return allocated(weighted, total)


def weights(alpha_bar: Sequence[float]) -> np.ndarray:
    """The weight (T,) of an error in x0 at each timestep; see the beginning of this file."""
    rho = [math.sqrt((1 - level) / max(level, 1e-12)) for level in alpha_bar] + [0.0]
    found = np.array([(1 - following / here) ** 2 for here, following in pairwise(rho)])
    for second in (i for i in range(1, len(alpha_bar) - 1) if rho[i] == rho[i + 1]):
        r = rho[second] / rho[second - 1]
        share = (1 / r - 1) / 2
        found[second - 1], found[second] = (1 - r - share) ** 2, share**2
    return found


def allocated(errors: np.ndarray, total: int) -> tuple[int, ...]:
    """The counts n_t from 1 to N with sum `total` that minimise the sum of errors[t, n_t - 1], of shape (T, N).

    Raises ValueError if T counts cannot sum to `total`, or an error is not finite.
    """
    steps, most = errors.shape
    if not np.isfinite(errors).all():
        raise ValueError("some errors are not finite: there is no telling which counts are best")
    if not steps <= total <= steps * most:
        raise ValueError(f"{steps} counts of 1 to {most} cannot sum to {total}")
    best = np.full(total + 1, np.inf)  # the smallest error of the timesteps so far, by their sum
    best[0] = 0.0
    chosen = np.zeros((steps, total + 1), np.int64)
    for step in range(steps):
        after = np.full((most, total + 1), np.inf)
        for n in range(1, min(most, total) + 1):
            after[n - 1, n:] = best[: total + 1 - n] + errors[step, n - 1]
        chosen[step], best = after.argmin(0) + 1, after.min(0)
    counts: list[int] = []
    for step in reversed(range(steps)):
        counts.append(int(chosen[step, total]))
        total -= counts[-1]
    return tuple(reversed(counts))


@torch.no_grad()
def measure_profile(model: FixedPointDiT, template: Any, noise: Tensor, labels: Tensor | None) -> Profile:
    """Measure the errors along the model's own trajectories from `noise` (B, C, H, W), under DDIM, each solve starting
    from the last solution as reuse has it.

    Raises ValueError if its fixed points are not found.
    """
    stepper = Stepper(template, "ddim", LEVELS, model.config.learned_variance)
    x = noise.float()
    y = torch.full((len(x),), model.null_class, device=x.device) if labels is None else labels.to(x.device)
    carry, errors = Carry("plain"), []
    everywhere = Solve(stopping=FixedIterations(CONVERGED), exits=tuple(range(1, MOST + 1)))
    for index, t in enumerate(stepper.timesteps):
        level = stepper.level(index)
        output = model(x, t, y, solve=everywhere, init=carry.start(level, len(x)))
        errors.append([_error(stepper, exit_, output.sample, x, level) for _, exit_ in sorted(output.exits.items())])
        short = model(x, t, y, solve=Solve(stopping=FixedIterations(BETWEEN)), init=carry.start(level, len(x)))
        carry.add(level, short.solution.value)
        x = stepper.step(output.sample.float(), index, x, [])
    if not np.isfinite(errors).all():
        raise ValueError(f"solves of {CONVERGED} iterations diverge: there is nothing to measure errors against")
    return Profile(np.array([stepper.level(i) for i in range(LEVELS)]), np.array(errors))


def _error(stepper: Stepper, found: Tensor, converged: Tensor, x: Tensor, alpha_bar: float) -> float:
    level = torch.tensor(alpha_bar)
    channels = x.shape[1]
    a, b = (predicted_x0(stepper.kind, p.float()[:, :channels], x, level) for p in (found, converged))
    if stepper.clip is not None:
        a, b = a.clamp(-stepper.clip, stepper.clip), b.clamp(-stepper.clip, stepper.clip)
    return float((a - b).square().mean())
