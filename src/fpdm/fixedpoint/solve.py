"""The one loop, and what it returns.

    z   the iterate           (batch, ...)
    f   the function          f(z, context) -> z
    r   relative residual     |f(z) - z| / |f(z)| per sample, in float32

`context` is whatever f needs that does not change over the iterations: a tensor, or (named) tuples of tensors.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from fpdm.fixedpoint.solvers import Picard, Solver
from fpdm.fixedpoint.stopping import Stopping

Function = Callable[[Tensor, Any], Tensor]


class Status(IntEnum):
    """How the solve of one sample ended."""

    COMPLETED = 0
    CONVERGED = 1
    ITERATION_LIMIT = 2
    DIVERGED = 3

    @property
    def message(self) -> str:
        return {
            Status.COMPLETED: "the number of iterations asked for was done",
            Status.CONVERGED: "the tolerance was reached",
            Status.ITERATION_LIMIT: "the tolerance was not reached: allow more iterations or a larger tolerance",
            Status.DIVERGED: "a value that is not finite appeared: try damping below 1, float32, or fewer iterations",
        }[self]


@dataclass(frozen=True)
class Solution:
    """The result of a solve.

    value       (batch, ...) the last iterate; under a tolerance, the last one that was finite
    residuals   (iterations, batch) float32, relative; NaN where a sample had stopped or nothing was recorded
    iterations  (batch,) int64, evaluations of f spent on each sample
    status      (batch,) int64, values of `Status`
    kept        the iterates asked for with `keep`, by iteration
    """

    value: Tensor
    residuals: Tensor
    iterations: Tensor
    status: Tensor
    kept: dict[int, Tensor]

    def then(self, later: "Solution") -> "Solution":
        """This solve followed by `later`, which started where this one ended, as one."""
        done = len(self.residuals)
        return Solution(
            later.value,
            torch.cat([self.residuals, later.residuals]),
            self.iterations + later.iterations,
            torch.where(later.status == Status.COMPLETED, self.status, later.status),
            self.kept | {done + k: z for k, z in later.kept.items()},
        )


def solve(
    f: Function,
    z: Tensor,
    context: Any = None,
    *,
    stopping: Stopping,
    solver: Solver = Picard(),
    record: bool = True,
    keep: Collection[int] = (),
) -> Solution:
    """Iterate z <- solver.step(z, f(z, context)) from `z` (batch, ...) until `stopping` says so.

    `record=False` skips the residuals of a fixed number of iterations. `keep` names iterations (from 1) whose iterates
    are wanted as well. Under autograd the loop is differentiated as it ran; see `gradients` for the alternatives.
    """
    batch, track = len(z), record or stopping.reads_residual
    state, residuals, kept = solver.init(z), [], {}
    running: Tensor | None = None  # None: all samples, known without asking the device
    spent = torch.zeros(batch, dtype=torch.int64, device=z.device)

    for k in range(1, stopping.max_iterations + 1):
        fz = f(z, context)
        following, state = solver.step(z, fz, state)
        r = relative_residual(z, fz) if track else z.new_full((batch,), torch.nan, dtype=torch.float32)
        residuals.append(r if running is None else r.masked_fill(~running, torch.nan))
        spent = spent + (1 if running is None else running)
        if stopping.reads_residual:
            moving = r.isfinite() if running is None else running & r.isfinite()
            following = torch.where(_column(moving, z), following, z)  # a sample that stopped or broke stays put
            running = moving & stopping.unfinished(r)
        z = following
        if k in keep:
            kept[k] = z
        if running is not None and not running.any():
            break

    rows = torch.stack(residuals) if residuals else z.new_empty((0, batch), dtype=torch.float32)
    return Solution(z, rows, spent, _status(rows, spent, stopping, track), kept)


@torch.no_grad()
def relative_residual(z: Tensor, fz: Tensor) -> Tensor:
    """|f(z) - z| / |f(z)| per sample, (batch,) float32. Not differentiated: it is a measurement."""
    dtype = torch.promote_types(fz.dtype, torch.float32)
    distance, size = (torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=dtype) for v in (fz - z, fz))
    # The second term keeps the ratio finite where f(z) = 0: infinite means diverged.
    return (distance / torch.maximum(size, 1e-30 * distance).clamp_min(torch.finfo(torch.float32).tiny)).float()


def _column(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.dim() - 1))


def _status(residuals: Tensor, spent: Tensor, stopping: Stopping, tracked: bool) -> Tensor:
    """Status codes (batch,), computed on the device: nothing here waits for a value."""
    if not tracked or not len(residuals):
        return torch.full_like(spent, Status.COMPLETED)
    last = residuals.gather(0, (spent - 1).unsqueeze(0))[0]
    if stopping.reads_residual:
        ended = torch.where(stopping.unfinished(last), Status.ITERATION_LIMIT, Status.CONVERGED)
    else:
        ended = torch.full_like(spent, Status.COMPLETED)
    return torch.where(last.isfinite(), ended, Status.DIVERGED)
