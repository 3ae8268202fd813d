"""The one loop, and what it returns.

    z   the iterate           (batch, ...)
    f   the function          f(z, context) -> z
    r   relative residual     |f(z) - z| / |f(z)| per sample, in float32

`context` is whatever f needs that does not change over the iterations: a tensor, or (named) tuples of tensors, whose
first axis is the batch. A sample that is finished leaves the batch and costs nothing more.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from fpdm.fixedpoint.solvers import Picard, Solver
from fpdm.fixedpoint.stopping import Counts, Stopping
from fpdm.fixedpoint.trees import select

Function = Callable[[Tensor, Any], Tensor]
# A solve has diverged whose |f(z) - z| ends at so many times its smallest, unless that is so small a part of |f(z)|.
GROWTH, HARMLESS = 10.0, 1e-2


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
            Status.DIVERGED: "the residual grew or was not finite: try damping below 1, float32, or fewer iterations",
        }[self]


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
    running = _Running(z, context, solver.init(z), limits, rescue)
    out, rows, kept = z, [], {}
    spent = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    status = torch.full_like(spent, Status.COMPLETED)
    if limits is not None:
        out, status, running = _without(out, status, running, stopping, limits > 0)

    for k in range(1, most + 1):
        fz = f(running.z, running.context)
        distance, r = _residuals(running.z, fz) if track else (None, None)
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

    residuals = torch.stack(rows) if rows else z.new_empty((0, len(z)), dtype=torch.float32)
    return Solution(running.into(out), residuals, spent, running.told(status, stopping), kept)


def relative_residual(z: Tensor, fz: Tensor) -> Tensor:
    """|f(z) - z| / |f(z)| per sample, (batch,) float32. Not differentiated: it is a measurement."""
    return _residuals(z, fz)[1]


@torch.no_grad()
def _residuals(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
    """|f(z) - z|, and its ratio to |f(z)|, per sample, (batch,)."""
    # In float64: squares of values above 1e19 overflow float32, and those below 1e-19 vanish.
    dtype = torch.float32 if fz.device.type == "mps" else torch.float64
    distance, size = (torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=dtype) for v in (fz - z, fz))
    # The second term keeps the ratio finite where f(z) = 0: infinite means diverged.
    ratio = distance / torch.maximum(size, 1e-30 * distance).clamp_min(torch.finfo(dtype).tiny)
    return distance, ratio.float()


@dataclass(frozen=True)
class _Running:
    """The samples of a batch that are still iterated.

    limits    (n,) on the CPU, the most iterations of each; None where all have the same
    rescue    whether to keep `best` and `least`
    places    (n,) their numbers in the batch; None while that is all of it
    best      (n, ...) f at the iterate of the smallest |f(z) - z|
    least     (n,) that distance, and that of the last iteration
    residual  (n,) of the last iteration, relative
    """

    z: Tensor
    context: Any
    state: Any
    limits: Tensor | None
    rescue: bool
    places: Tensor | None = None
    best: Tensor | None = None
    least: Tensor | None = None
    distance: Tensor | None = None
    residual: Tensor | None = None

    def moved(
        self, solver: Solver, fz: Tensor, distance: Tensor | None, residual: Tensor | None, stopping: Stopping
    ) -> "_Running":
        """These samples after an iteration."""
        following, state = solver.step(self.z, fz, self.state)
        if stopping.reads_residual:
            # Of a sample that is solved, f of the iterate that was found to be: nobody knows the residual of the step.
            assert residual is not None
            following = torch.where(_column(stopping.unfinished(residual), fz), following, fz)
        best, least = self.best, self.least
        if distance is not None:
            least = torch.full_like(distance, torch.inf) if least is None else least
            if self.rescue:
                best = self.z.to(fz.dtype) if best is None else best
                best = torch.where(_column(distance < least, fz), fz, best)  # never at a NaN
            least = torch.where(distance < least, distance, least)
        return replace(self, z=following, state=state, best=best, least=least, distance=distance, residual=residual)

    def selected(self, stay: Tensor) -> "_Running":
        """Those at `stay` (m,), numbers among these samples."""
        here = stay.to(self.z.device, non_blocking=True)
        tensors = (self.z, self.context, self.state, self.best, self.least, self.distance, self.residual)
        z, context, state, *measured = select(tensors, here)
        limits = None if self.limits is None else self.limits[stay.cpu()]
        places = here if self.places is None else self.places[here]
        return _Running(z, context, state, limits, self.rescue, places, *measured)

    def into(self, out: Tensor, rescue: bool = True) -> Tensor:
        """`out` (batch, ...) with the values of these samples in their places."""
        value = self.z
        if rescue and self.best is not None:
            value = torch.where(_column(self.diverged, value), self.best, value)
        return value if self.places is None else out.to(value.dtype).index_copy(0, self.places, value)

    @property
    def diverged(self) -> Tensor:
        """Which of the samples have diverged so far (n,), nothing being waited for."""
        assert self.distance is not None
        assert self.least is not None
        assert self.residual is not None
        grown = (self.distance > GROWTH * self.least) & (self.residual > HARMLESS)
        return grown | ~self.distance.isfinite() | ~self.residual.isfinite()

    def told(self, status: Tensor, stopping: Stopping) -> Tensor:
        """`status` (batch,) with how these samples ended in their places."""
        if self.residual is None:
            return status
        ended = status.new_full((len(self.z),), Status.COMPLETED)
        if stopping.reads_residual:
            ended = torch.where(stopping.unfinished(self.residual), Status.ITERATION_LIMIT, Status.CONVERGED)
        ended = torch.where(self.diverged, Status.DIVERGED, ended)
        return ended if self.places is None else status.index_copy(0, self.places, ended)


def _limits(limit: Counts, batch: int) -> tuple[int, Tensor | None]:
    """The most iterations of any sample; and of each, where they differ."""
    if isinstance(limit, int):
        return limit, None
    if len(limit) != batch:
        raise ValueError(f"there are {len(limit)} limits of iterations for {batch} samples: give one for each, or one")
    most = max(limit, default=0)
    return most, None if most == min(limit, default=0) else torch.tensor(limit)


def _going(running: _Running, stopping: Stopping, k: int) -> Tensor | None:
    """Which of the samples go on after iteration k, as booleans (n,); None for all, known without asking the device."""
    going = None if running.limits is None else running.limits > k
    if stopping.reads_residual:
        assert running.residual is not None
        unsolved = running.residual.isfinite() & stopping.unfinished(running.residual)
        going = unsolved.cpu() if going is None else unsolved.cpu() & going
    return None if going is None or bool(going.all()) else going


def _without(
    out: Tensor, status: Tensor, running: _Running, stopping: Stopping, going: Tensor
) -> tuple[Tensor, Tensor, _Running]:
    """`out` and `status` with those of the samples that are finished, and the others."""
    if bool(going.all()):
        return out, status, running
    return running.into(out), running.told(status, stopping), running.selected(going.nonzero().squeeze(1))


def _row(r: Tensor | None, places: Tensor | None, spent: Tensor) -> Tensor:
    """Residuals (batch,): NaN where there are none."""
    if r is not None and places is None:
        return r
    row = torch.full(spent.shape, torch.nan, device=spent.device)
    return row if r is None or places is None else row.index_copy(0, places, r)


def _column(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.dim() - 1))
