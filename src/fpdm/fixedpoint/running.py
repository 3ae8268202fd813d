"""Samples of a batch that are still iterated: they move together, leave one by one, and others may take their places.

z   the iterate           (n, ...)
f   the function          f(z, context) -> z
r   relative residual     |f(z) - z| / |f(z)| per sample, in float32
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from fpdm.fixedpoint.solvers import Solver
from fpdm.fixedpoint.stopping import Stopping
from fpdm.fixedpoint.tracing import can_ask
from fpdm.fixedpoint.trees import select

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


def relative_residual(z: Tensor, fz: Tensor) -> Tensor:
    """|f(z) - z| / |f(z)| per sample, (batch,) float32. Not differentiated: it is a measurement."""
    return residuals(z, fz)[1]


@torch.no_grad()
def residuals(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
    """|f(z) - z|, and its ratio to |f(z)|, per sample, (batch,)."""
    distance, size = _norm(fz - z), _norm(fz)
    # The second term keeps the ratio finite where f(z) = 0: infinite means diverged.
    ratio = distance / torch.maximum(size, 1e-30 * distance).clamp_min(torch.finfo(distance.dtype).tiny)
    return distance, ratio.float()


def _norm(v: Tensor) -> Tensor:
    """|v| per sample, (batch,): in float64, as squares of values above 1e19 overflow float32, and those below 1e-19
    vanish. That takes a CPU twice the time, so where it can be told, it is done there only if a faster norm comes near
    to these."""
    if v.device.type == "cpu" and v.dim() > 2 and can_ask():
        of_tokens = torch.linalg.vector_norm(v, dim=-1, dtype=torch.promote_types(v.dtype, torch.float32))
        norm = torch.linalg.vector_norm(of_tokens.flatten(1), dim=1, dtype=torch.float64)
        if bool(((norm > 1e-12) & (norm < 1e18)).all()):
            return norm
    return torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=_precise(v))


def _precise(v: Tensor) -> torch.dtype:
    return torch.float32 if v.device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Running:
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

    @classmethod
    def begun(cls, z: Tensor, context: Any, state: Any) -> "Running":
        """Samples before their first iteration, everything in its place: they can join others, or be taken out."""
        infinite = torch.full((len(z),), torch.inf, dtype=_precise(z), device=z.device)
        measured = {"least": infinite, "distance": infinite.clone(), "residual": infinite.float()}
        return cls(z, context, state, None, True, best=z.clone(), **measured)

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All that belongs to single samples, but for the limits."""
        return (self.z, self.context, self.state, self.best, self.least, self.distance, self.residual)

    def moved(
        self, solver: Solver, fz: Tensor, distance: Tensor | None, residual: Tensor | None, stopping: Stopping
    ) -> "Running":
        """These samples after an iteration."""
        following, state = solver.step(self.z, fz, self.state)
        if stopping.reads_residual:
            # Of a sample that is solved, f of the iterate that was found to be: nobody knows the residual of the step.
            assert residual is not None
            following = torch.where(column(stopping.unfinished(residual), fz), following, fz)
        best, least = self.best, self.least
        if distance is not None:
            least = torch.full_like(distance, torch.inf) if least is None else least
            nearer = distance < least  # never at a NaN
            if self.rescue:
                best = self.z.to(fz.dtype) if best is None else best
                best = fz if known(nearer) else torch.where(column(nearer, fz), fz, best)
            least = torch.where(nearer, distance, least)
        return replace(self, z=following, state=state, best=best, least=least, distance=distance, residual=residual)

    def selected(self, stay: Tensor) -> "Running":
        """Those at `stay` (m,), numbers among these samples."""
        here = stay.to(self.z.device, non_blocking=True)
        z, context, state, *measured = select(self.tensors, here)
        limits = None if self.limits is None else self.limits[stay.cpu()]
        places = here if self.places is None else self.places[here]
        return Running(z, context, state, limits, self.rescue, places, *measured)

    def into(self, out: Tensor, rescue: bool = True) -> Tensor:
        """`out` (batch, ...) with the values of these samples in their places."""
        value = self.value if rescue else self.z
        return value if self.places is None else out.to(value.dtype).index_copy(0, self.places, value)

    @property
    def value(self) -> Tensor:
        """(n, ...) the iterates; of samples that have diverged, the best that was kept, if any was."""
        return self.z if self.best is None else torch.where(column(self.diverged, self.z), self.best, self.z)

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


def known(mask: Tensor) -> bool:
    """Whether `mask` is true for all samples and that can be known at once: not of another device, which would have to
    be waited for."""
    return mask.device.type == "cpu" and can_ask() and bool(mask.all())


def column(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.dim() - 1))
