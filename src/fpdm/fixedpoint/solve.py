"""The one loop, and what it returns.

    z   the iterate           (batch, ...)
    f   the function          f(z, context) -> z
    r   relative residual     |f(z) - z| / |f(z)| per sample, in float32

`context` is whatever f needs that does not change over the iterations: a tensor, or (named) tuples of tensors, whose
first axis is the batch. A sample that is finished leaves the batch and costs nothing more.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fpdm.fixedpoint.running import Running, Status, residuals
from fpdm.fixedpoint.solvers import Picard, Solver
from fpdm.fixedpoint.stopping import Counts, Stopping

Function = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Solution:
    """The result of a solve.

    value       (batch, ...) the last iterate; of a sample that diverged, f at the iterate of the smallest residual
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

    `record=False` skips the residuals of a fixed number of iterations, by which samples that diverge are known. `keep`
    names iterations (from 1) whose iterates are wanted as well. Under autograd the loop is differentiated as it ran
    (for alternatives see `gradients`), and a fixed number of iterations returns the last iterate whatever it is.

    Raises ValueError if the rule has another number of limits than there are samples.
    """
    track = record or stopping.reads_residual
    most, limits = _limits(stopping.limit, len(z))
    rescue = track and (stopping.reads_residual or not torch.is_grad_enabled())
    running = Running(z, context, solver.init(z), limits, rescue)
    out, rows, kept = z, [], {}
    spent = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    status = torch.full_like(spent, Status.COMPLETED)
    if limits is not None:
        out, status, running = _without(out, status, running, stopping, limits > 0)

    for k in range(1, most + 1):
        fz = f(running.z, running.context)
        distance, r = residuals(running.z, fz) if track else (None, None)
        rows.append(_row(r, running.places, spent))
        here = running.places
        spent = spent + 1 if here is None else spent.index_add(0, here, torch.ones_like(here))
        running = running.moved(solver, fz, distance, r, stopping)
        if k in keep:
            kept[k] = running.into(out, rescue=False)
        going = _going(running, stopping, k)
        if going is not None:
            out, status, running = _without(out, status, running, stopping, going)
            if not len(running.z):
                break

    table = torch.stack(rows) if rows else z.new_empty((0, len(z)), dtype=torch.float32)
    return Solution(running.into(out), table, spent, running.told(status, stopping), kept)


def _limits(limit: Counts, batch: int) -> tuple[int, Tensor | None]:
    """The most iterations of any sample; and of each, where they differ."""
    if isinstance(limit, int | Integral):
        return int(limit), None
    if len(limit) != batch:
        raise ValueError(f"there are {len(limit)} limits of iterations for {batch} samples: give one for each, or one")
    most = max(limit, default=0)
    return most, None if most == min(limit, default=0) else torch.tensor(limit)


def _going(running: Running, stopping: Stopping, k: int) -> Tensor | None:
    """Which of the samples go on after iteration k, as booleans (n,); None for all, known without asking the device."""
    going = None if running.limits is None else running.limits > k
    if stopping.reads_residual:
        assert running.residual is not None
        unsolved = running.residual.isfinite() & stopping.unfinished(running.residual)
        going = unsolved.cpu() if going is None else unsolved.cpu() & going
    return None if going is None or bool(going.all()) else going


def _without(
    out: Tensor, status: Tensor, running: Running, stopping: Stopping, going: Tensor
) -> tuple[Tensor, Tensor, Running]:
    """`out` and `status` with those of the samples that are finished, and the others."""
    if bool(going.all()):
        return out, status, running
    return running.into(out), running.told(status, stopping), running.selected(going.nonzero().squeeze(1))


def _row(r: Tensor | None, places: Tensor | None, spent: Tensor) -> Tensor:
    """Residuals (batch,): NaN where there are none."""
    if r is not None and places is None:
        return r
    row = torch.full(spent.shape, torch.nan, dtype=torch.float32, device=spent.device)
    return row if r is None or places is None else row.index_copy(0, places, r)
