"""What a sampling spent, and how well its fixed points were solved."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpdm.fixedpoint import Solution, Status
from fpdm.sampling.budget import Cost, Plan
from fpdm.sampling.spending import Purse


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
    residuals     per timestep and iteration, |f(z) - z| / |f(z)|, mean over images; empty without iterations
    running       per timestep and iteration, the images that made it
    residual      per timestep, the last residual of an image, mean over images: how far from solved it was left
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
    residuals: list[list[float]]
    running: list[list[int]]
    residual: list[float]
    status: list[dict[str, int]]
    diverged: int
    seconds: float

    def merged(self, other: "Report") -> "Report":
        """This report and another of the same plan as one: means weighted by images, seconds added."""
        images = self.images + other.images
        share = other.images / images

        def mean(mine: float, theirs: float) -> float:
            return mine + share * (theirs - mine)

        both = [
            merged_residuals(*rows)
            for rows in zip(self.residuals, self.running, other.residuals, other.running, strict=True)
        ]
        return replace(
            self,
            images=images,
            spent=mean(self.spent, other.spent),
            most=max(self.most, other.most),
            total_passes=mean(self.total_passes, other.total_passes),
            operations=mean(self.operations, other.operations),
            passes=[mean(a, b) for a, b in zip(self.passes, other.passes, strict=True)],
            residuals=[residuals for residuals, _ in both],
            running=[running for _, running in both],
            residual=[mean(a, b) for a, b in zip(self.residual, other.residual, strict=True)],
            status=[dict(Counter(a) + Counter(b)) for a, b in zip(self.status, other.status, strict=True)],
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


def merged_residuals(
    mine: list[float], counts: list[int], theirs: list[float], others: list[int]
) -> tuple[list[float], list[int]]:
    """Residuals and the images behind them, of two samplings at one timestep: one may have gone on for longer."""
    residuals, running = [], []
    for k in range(max(len(mine), len(theirs))):
        a, n = (mine[k], counts[k]) if k < len(mine) else (0.0, 0)
        b, m = (theirs[k], others[k]) if k < len(theirs) else (0.0, 0)
        residuals.append((a * n + b * m) / max(n + m, 1))
        running.append(n + m)
    return residuals, running


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
    found = [solution for solution in solutions if solution is not None]
    calls = torch.tensor([1 + twice for twice in guided])
    counts = [[s.iterations[:images].cpu(), s.iterations[images:].cpu()] for s in found]
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
        residuals=[_mean_of_finite(s.residuals[: int(s.iterations[:images].max()), :images]) for s in found],
        running=[_running(s.iterations[:images]) for s in found],
        residual=[_mean_of_finite(_last(s)[None, :images])[0] for s in found],
        status=[_counted(s.status[:images]) for s in found],
        diverged=int(_broken(x, found).sum()),
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


def _broken(x: Tensor, solutions: Sequence[Solution]) -> Tensor:
    """Which images are not finite, or had a fixed point that diverged, in either half."""
    broken = ~x.isfinite().flatten(1).all(1)
    for solution in solutions:
        for half in solution.status.split(len(x)):
            broken = broken | (half == Status.DIVERGED)
    return broken


def _running(spent: Tensor) -> list[int]:
    """How many images made each iteration."""
    return [int((spent > k).sum()) for k in range(int(spent.max()))]


def _last(solution: Solution) -> Tensor:
    """The last residual of each image (B,)."""
    return solution.residuals.gather(0, (solution.iterations - 1).clamp_min(0)[None])[0]


def _counted(status: Tensor) -> dict[str, int]:
    return {Status(code).name.lower(): count for code, count in sorted(Counter(status.tolist()).items())}


def _mean_of_finite(residuals: Tensor) -> list[float]:
    """The mean residual of each iteration, (iterations, B) -> (iterations,), over the images that had one: one that
    diverged must not hide the others, and JSON knows no NaN. 0 where all diverged; the report counts those."""
    finite = residuals.isfinite()
    return (residuals.masked_fill(~finite, 0).sum(1) / finite.sum(1).clamp_min(1)).tolist()
