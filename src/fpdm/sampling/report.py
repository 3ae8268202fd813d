"""What a sampling spent, and how well its fixed points were solved."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpdm.fixedpoint import Solution, Status
from fpdm.sampling.budget import Cost, Plan
from fpdm.sampling.spending import Purse

DIVERGED = Status.DIVERGED.name.lower()


@dataclass(frozen=True)
class Report:
    """One sampling, or several with the same plan taken together. Lists run in sampling order (noise to image).

    images        how many
    asked         block passes per image asked for, None if no budget was given
    planned       block passes per image
    spent         the same, what it was: exactly the plan, or, under a tolerance, at most that, on average
    most          of one image; under a pooled tolerance it may be more than planned
    total_passes  per image, guidance's second evaluation of the network included
    operations    the same in operations: two per multiply-add of linear layers and attention
    timesteps     of the noise schedule
    iterations    planned per timestep; None at every timestep of a network without iterations
    passes        spent per timestep, on average
    residuals     per timestep and iteration, |f(z) - z| / |f(z)|, mean over images, of which those that have stopped
                  count with their last, and those that diverged do not; None if all did. Empty without iterations
    running       per timestep and iteration, the images that made it
    status        per timestep, how many images ended how: see `Status`
    diverged      images of which a fixed point diverged, or that are not finite: they may show nothing
    seconds       in all, from noise to images (without decoding and writing)
    """

    images: int
    asked: int | None
    planned: int
    spent: float
    most: int
    total_passes: float
    operations: float
    timesteps: list[int]
    iterations: list[int | None]
    passes: list[float]
    residuals: list[list[float | None]]
    running: list[list[int]]
    status: list[dict[str, int]]
    diverged: int
    seconds: float

    @property
    def residual(self) -> list[float | None]:
        """The last residual of each timestep: how far from solved it was left."""
        return [row[-1] for row in self.residuals if row]

    def merged(self, other: "Report") -> "Report":
        """This report and another of the same plan as one: means weighted by images, seconds added."""
        images, statuses = self.images + other.images, list(zip(self.status, other.status, strict=True))
        share = other.images / images

        def mean(mine: float, theirs: float, share: float = share) -> float:
            return mine + share * (theirs - mine)

        def share_of(mine: dict[str, int], theirs: dict[str, int]) -> float:
            """The share of the other's images in a mean that those that diverged are not in."""
            a, b = self.images - mine.get(DIVERGED, 0), other.images - theirs.get(DIVERGED, 0)
            return b / (a + b) if a + b else share

        return replace(
            self,
            images=images,
            spent=mean(self.spent, other.spent),
            most=max(self.most, other.most),
            total_passes=mean(self.total_passes, other.total_passes),
            operations=mean(self.operations, other.operations),
            passes=[mean(a, b) for a, b in zip(self.passes, other.passes, strict=True)],
            residuals=[
                [a if b is None else b if a is None else mean(a, b, share_of(*status)) for a, b in alongside(*rows)]
                for *rows, status in zip(self.residuals, other.residuals, statuses, strict=True)
            ],
            running=[
                [a + b for a, b in itertools.zip_longest(mine, theirs, fillvalue=0)]
                for mine, theirs in zip(self.running, other.running, strict=True)
            ],
            status=[dict(Counter(a) + Counter(b)) for a, b in statuses],
            diverged=self.diverged + other.diverged,
            seconds=self.seconds + other.seconds,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        """Raises ValueError for what is not of a report."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"this is not a report of this version: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")


def alongside(mine: list[Any], theirs: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The residuals of two samplings at one timestep, side by side: the one that stopped first stays at its last."""
    for k in range(max(len(mine), len(theirs))):
        yield mine[min(k, len(mine) - 1)], theirs[min(k, len(theirs) - 1)]


def report_of(
    plan: Plan,
    cost: Cost,
    operations: Cost,
    timesteps: list[int],
    solutions: Sequence[Solution | None],
    x: Tensor,
    guided: list[bool],
    purse: Purse,
    seconds: float,
) -> Report:
    """The report of one sampling of images `x` (B, C, H, W).

    cost, operations  of one call of the network
    guided            per timestep, whether the network was evaluated twice: `solutions` then have the conditional half
                      first
    """
    images = len(x)
    found = _fetched([solution for solution in solutions if solution is not None])
    calls = torch.tensor([1 + twice for twice in guided])
    counts = [[s.iterations[:images], s.iterations[images:]] for s in found]
    first = torch.stack([own for own, _ in counts]) if found else torch.zeros(len(timesteps), images, dtype=torch.int64)
    both = sum(float(half.double().sum()) for halves in counts for half in halves) / images  # iterations per image
    per_step = cost.fixed + cost.per_iteration * first  # (T, B)
    per_image = per_step.sum(0)
    check_spent(per_image, plan.planned, purse)
    return Report(
        images=images,
        asked=plan.asked,
        planned=plan.planned,
        spent=float(per_image.double().mean()),
        most=int(per_image.max()),
        total_passes=cost.fixed * int(calls.sum()) + cost.per_iteration * both,
        operations=operations.fixed * int(calls.sum()) + operations.per_iteration * both,
        timesteps=timesteps,
        iterations=list(plan.iterations),
        passes=per_step.double().mean(1).tolist(),
        residuals=[_means(s.residuals[:, :images], s.iterations[:images]) for s in found],
        running=[_running(s.iterations[:images]) for s in found],
        status=[_counted(s.status[:images]) for s in found],
        diverged=int(_broken(x.isfinite().flatten(1).all(1).cpu(), found).sum()),
        seconds=seconds,
    )


def check_spent(per_image: Tensor, planned: int, purse: Purse) -> None:
    """What was spent by each image must be what was planned; at most that under a tolerance; and in all, if pooled."""
    if purse.tolerance is None:
        assert (per_image == planned).all(), f"planned {planned} block passes, spent {per_image.tolist()}"
    elif purse.pooled:
        assert per_image.sum() <= planned * len(per_image), f"planned {planned} each, spent {per_image.tolist()}"
    else:
        assert (per_image <= planned).all(), f"planned {planned} block passes, spent {per_image.tolist()}"


def _fetched(solutions: Sequence[Solution]) -> list[Solution]:
    """What is known of the solves, on the CPU: all of it in one transfer."""
    parts = [part for s in solutions for part in (s.residuals, s.iterations, s.status)]
    flat = torch.cat([part.float().flatten() for part in parts]).cpu() if parts else torch.empty(0)
    values = [
        v.view(part.shape).to(part.dtype) for v, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
    ]
    return [
        replace(s, residuals=values[3 * i], iterations=values[3 * i + 1], status=values[3 * i + 2])
        for i, s in enumerate(solutions)
    ]


def _broken(finite: Tensor, solutions: Sequence[Solution]) -> Tensor:
    """Which images are not finite, or had a fixed point that diverged, in either half."""
    broken = ~finite
    for solution in solutions:
        for half in solution.status.split(len(finite)):
            broken = broken | (half == Status.DIVERGED)
    return broken


def _running(spent: Tensor) -> list[int]:
    """How many images made each iteration."""
    return [int((spent > k).sum()) for k in range(int(spent.max()))]


def _counted(status: Tensor) -> dict[str, int]:
    return {Status(code).name.lower(): count for code, count in sorted(Counter(status.tolist()).items())}


def _means(residuals: Tensor, spent: Tensor) -> list[float | None]:
    """The mean residual of each iteration, from (iterations, B), over the images whose residual is finite."""
    rows = torch.arange(int(spent.max()), device=spent.device)[:, None].minimum(spent - 1).clamp_min(0)
    table = residuals.gather(0, rows)
    finite = table.isfinite()
    counts, sums = finite.sum(1).tolist(), table.masked_fill(~finite, 0).double().sum(1).tolist()
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]
