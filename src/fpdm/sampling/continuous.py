"""Many courses at once: one block call for the samples of all of them, whatever timestep and iteration each is at.

The weights of the fixed point are the same at every timestep, so samples of different plans, tolerances and schedulers
can be iterated together. A sample that has its fixed point makes room between two iterations, and its course goes on to
its next timestep, or gives its room to another course.
"""

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any, TypeVar

import torch
from torch import Tensor

from fpdm.fixedpoint import Picard, Running, Solution, Solver, Status, Tolerance, joined, put, residuals, select
from fpdm.models import FixedPointDiT, Output
from fpdm.sampling.sampler import Call

PICARD = Picard()
PAUSE = 1e-3  # seconds between questions for a course where there is none at all
R = TypeVar("R")
T = TypeVar("T")


@dataclass
class Visit:
    """A call of a course that is being answered.

    number  of the course
    rows    of the call that have their fixed points: z and conditioning (1, ...), status, and residuals by iteration
    """

    number: int
    course: Generator[Call, Output, Any]
    call: Call
    rows: dict[int, tuple[Tensor, Tensor, Tensor, list[Tensor]]] = field(default_factory=dict)


@dataclass
class Seat:
    """One sample of the running batch.

    row     of its visit's call
    left    iterations that it may still spend
    relative  the residual at which it stops before; below any for none
    trail   of each iteration so far, the residuals of the batch and its place among them
    """

    visit: Visit
    row: int
    left: int
    relative: float
    trail: list[tuple[Tensor, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Mixed:
    """The stopping rule of samples of which each has its own residual `relative` (n,) to reach."""

    relative: Tensor
    reads_residual: bool
    limit: int = 0

    def unfinished(self, residual: Tensor) -> Tensor:
        """Those without a residual to reach always; the others not once they are broken, either."""
        return (self.relative < 0) | ((residual > self.relative) & residual.isfinite())


@torch.no_grad()
def continuous(
    courses: Iterable[Generator[Call, Output, R] | None], most: int, return_exceptions: bool = False
) -> Iterator[tuple[int, R | Exception]]:
    """Run courses of one network, in the order in which they come, with up to `most` samples in the batch, or those of
    one call if it has more; yields the number of each course and what it returns, as they finish. Courses are begun
    when there is room; None in place of one says that none is there at the moment, and those under way go on. What a
    call takes is known once it is made: one that does not fit waits, and others behind it.

    Whatever a course raises is raised, with its number as a note, when those that are under way have finished; no other
    is begun then. With `return_exceptions` it is yielded in place of the course's result, and nothing ends. What
    `courses` itself raises is always raised. A course raises ValueError for a network without iterations, and for a
    solver other than plain Picard iteration.
    """
    waiting, numbers, batch = iter(courses), count(), Batch(most)
    failed: list[Exception] = []
    finished: list[tuple[int, R | Exception]] = []
    answers: list[tuple[Visit, Output]] = []
    calls: list[Visit] = []

    def called(number: int, course: Generator[Call, Output, R], answer: Output | None) -> Iterator[Visit]:
        """The next call of a course, unless it has none."""
        try:
            yield Visit(number, course, checked(course.send(answer)))  # type: ignore[arg-type]
        except StopIteration as done:
            finished.append((number, done.value))
        except Exception as error:  # a course may do anything, with its callbacks
            if return_exceptions:
                finished.append((number, error))
            else:
                error.add_note(f"in call {number}")
                failed.append(error)

    ended = False
    while True:
        calls += [call for visit, output in answers for call in called(visit.number, visit.course, output)]
        yield from drained(finished)
        while not (failed or ended) and batch.has_room(calls):
            try:
                course = next(waiting)
            except StopIteration:
                ended = True
            except Exception as error:
                failed.append(error)
            else:
                if course is None:
                    break
                calls += called(next(numbers), course, None)
        yield from drained(finished)
        fitting = batch.fitting(calls)
        batch.admit(calls[:fitting])
        calls = calls[fitting:]
        if batch.seats:
            answers = batch.iterated()
        elif failed or ended:
            break
        else:
            answers = []
            time.sleep(PAUSE)
    if failed:
        raise failed[0]


def drained(items: list[T]) -> Iterator[T]:
    """The items, in order, each taken out."""
    while items:
        yield items.pop(0)


class Batch:
    """The samples that are iterated together: seat i is sample i of `running`. Seats that a call leaves are taken by
    the next one, in place."""

    def __init__(self, most: int):
        self.most = most
        self.seats: list[Seat] = []
        self.running: Running | None = None
        self.free: list[int] = []  # seats that were left since the last admission

    def has_room(self, calls: list[Visit]) -> bool:
        """Whether the batch, these calls included, has room for another."""
        return self.taken + sum(len(visit.call.x) for visit in calls) < self.most

    def fitting(self, calls: list[Visit]) -> int:
        """How many of these calls there is room for, in their order; one, if nothing else is in the batch."""
        ends = accumulate((len(visit.call.x) for visit in calls), initial=self.taken)
        count = sum(end <= self.most for end in ends) - 1
        return max(count, 1 if calls and not self.taken else 0)

    @property
    def taken(self) -> int:
        """Seats, but for those that were left."""
        return len(self.seats) - len(self.free)

    def admit(self, calls: list[Visit]) -> None:
        """Seat the samples of these calls, and close the batch up."""
        seats = [seat for visit in calls for seat in seats_of(visit)]
        if seats:
            self._seat(seats, begun([visit.call for visit in calls]))
        if self.free and self.running is not None:
            stay = [i for i in range(len(self.seats)) if i not in set(self.free)]
            self.seats = [self.seats[i] for i in stay]
            self.running = self.running.selected(torch.tensor(stay, dtype=torch.int64))
        self.free = []

    def _seat(self, seats: list[Seat], new: Running) -> None:
        if self.running is None or not self.seats:
            self.seats, self.running, self.free = seats, new, []
            return
        taken, self.free = self.free[: len(seats)], self.free[len(seats) :]
        order = torch.arange(len(seats), device=new.z.device)
        if taken:
            for i, seat in zip(taken, seats, strict=False):
                self.seats[i] = seat
            places = torch.tensor(taken, device=new.z.device)
            put(self.running.tensors, places, select(new.tensors, order[: len(taken)]))
        if len(taken) < len(seats):
            self.seats += seats[len(taken) :]
            z, context, state, best, least, distance, residual = joined(
                self.running.tensors, select(new.tensors, order[len(taken) :])
            )
            self.running = Running(z, context, state, None, True, None, best, least, distance, residual)

    def iterated(self) -> list[tuple[Visit, Output]]:
        """One iteration of all; the calls that are answered by it, and their answers."""
        assert self.running is not None
        model = self.seats[0].visit.call.model
        assert isinstance(model, FixedPointDiT)
        fz = model.core(self.running.z, self.running.context[0])
        distance, r = residuals(self.running.z, fz)
        relative = torch.tensor([seat.relative for seat in self.seats], device=r.device)
        stopping = Mixed(relative, any(seat.relative >= 0 for seat in self.seats))
        self.running = self.running.moved(PICARD, fz, distance, r, stopping)
        noted = r.clone()  # the other is written to when its samples' seats are taken
        for i, seat in enumerate(self.seats):
            seat.left -= 1
            seat.trail.append((noted, i))
        going = stopping.unfinished(r).tolist() if stopping.reads_residual else [True] * len(self.seats)
        self.free = [i for i, seat in enumerate(self.seats) if not (seat.left and going[i])]
        return self._answered(model) if self.free else []

    def _answered(self, model: FixedPointDiT) -> list[tuple[Visit, Output]]:
        """Note what the samples that are done came to; answer the calls of which all are."""
        assert self.running is not None
        left = self.running.selected(torch.tensor(self.free))
        value, status = left.value, status_of(left, [self.seats[i] for i in self.free])
        done: list[Visit] = []
        for k, i in enumerate(self.free):
            seat = self.seats[i]
            trail = [r[place] for r, place in seat.trail]
            seat.visit.rows[seat.row] = (value[k : k + 1], left.context[1][k : k + 1], status[k], trail)
            if len(seat.visit.rows) == len(seat.visit.call.x):
                done.append(seat.visit)
        if not done:
            return []
        rows = [visit.rows[i] for visit in done for i in range(len(visit.rows))]
        z = torch.cat([row[0] for row in rows])
        samples = model.decode(z, torch.cat([row[1] for row in rows]))
        sizes = [len(visit.rows) for visit in done]
        return [
            (visit, Output(sample, solution_of(visit, value), {}))
            for visit, sample, value in zip(done, samples.split(sizes), z.split(sizes), strict=True)
        ]


def checked(call: Call) -> Call:
    """Raises ValueError for a call that cannot be answered beside others."""
    if call.solve is None or not isinstance(call.model, FixedPointDiT):
        raise ValueError("a network without iterations gains nothing here: draw its images in batches")
    check_shared(call.solve.solver)
    return call


def check_shared(solver: Solver) -> None:
    """Raises ValueError for a solver whose samples cannot be iterated beside others."""
    if solver != PICARD:
        raise ValueError(
            f'solver is {solver!r}; samples at different iterations share Picard steps only: say solver="picard"'
        )


def seats_of(visit: Visit) -> list[Seat]:
    """A seat for each sample of a call."""
    solve = visit.call.solve
    assert solve is not None
    limit, count = solve.stopping.limit, len(visit.call.x)
    limits = [limit] * count if isinstance(limit, int) else list(limit)
    relative = solve.stopping.relative if isinstance(solve.stopping, Tolerance) else -1.0
    return [Seat(visit, row, n, relative) for row, n in enumerate(limits)]


def begun(calls: list[Call]) -> Running:
    """The samples of these calls, encoded together, before their first iteration."""
    model = calls[0].model
    assert isinstance(model, FixedPointDiT)
    x, y = torch.cat([call.x for call in calls]), torch.cat([call.y for call in calls])
    t = torch.cat([torch.full((len(call.x),), call.t, device=x.device) for call in calls])
    u, context, c = model.encode(x, t, y)
    sizes = [len(call.x) for call in calls]
    starts = [
        own if call.init is None else call.init.to(own.dtype)
        for call, own in zip(calls, u.split(sizes), strict=True)
    ]  # fmt: skip
    return Running.begun(torch.cat(starts), (context, c), PICARD.init(u))


def status_of(left: Running, seats: list[Seat]) -> Tensor:
    """How these samples ended (n,), nothing being waited for."""
    assert left.residual is not None
    relative = torch.tensor([seat.relative for seat in seats], device=left.residual.device)
    ended = torch.where(left.residual > relative, Status.ITERATION_LIMIT, Status.CONVERGED)
    ended = torch.where(relative < 0, Status.COMPLETED, ended)
    return torch.where(left.diverged, Status.DIVERGED, ended)


def solution_of(visit: Visit, value: Tensor) -> Solution:
    """The solution of a call, as a solve of it alone would tell it."""
    rows = [visit.rows[i] for i in range(len(visit.rows))]
    counts = [len(trail) for *_, trail in rows]
    table = value.new_full((max(counts), len(rows)), torch.nan, dtype=torch.float32)
    for i, (*_, trail) in enumerate(rows):
        table[: len(trail), i] = torch.stack(trail)
    spent = torch.tensor(counts, device=value.device)
    return Solution(value, table, spent, torch.stack([row[2] for row in rows]), {})
