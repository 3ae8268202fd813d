"""What a sweep is made of: points, each a model and a way to draw from it."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from fpdm.drawing import Choices, load_pipeline
from fpdm.files import model_folder
from fpdm.models import DiT
from fpdm.names import unknown
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.sampling import SCHEDULERS, check_allocation, check_reuse, operations_of, solver_of, total
from fpdm.weights import digest


@dataclass(frozen=True)
class Settings:
    """What all points of a sweep share: what they are measured against, and how they are drawn."""

    data: str
    split: str = "train"
    features: str | None = None
    weights: str | None = None
    statistics: str | None = None
    num_images: int = 1000
    batch_size: int = 64
    guidance_scale: float = 1.0
    device: str = "auto"
    dtype: str = "float32"


@dataclass(frozen=True)
class Axes:
    """What the points of a sweep differ in, besides the model: all combinations.

    iterations  per timestep; None leaves them to the plan's default
    tuned       whether the models' tuned plans are points, too
    """

    budgets: Sequence[int]
    schedulers: Sequence[str]
    iterations: Sequence[int | None] = (None,)
    allocations: Sequence[str] = ("constant",)
    reuses: Sequence[str] = ("plain",)
    solvers: Sequence[str] = ("picard",)
    seeds: Sequence[int] = (0,)
    tuned: bool = False

    def check(self) -> None:
        """Raises ValueError for names that mean nothing. What they mean may still not fit a model or a budget."""
        for name in self.schedulers:
            if name not in SCHEDULERS:
                raise ValueError(unknown("scheduler", name, SCHEDULERS))
        for allocation in self.allocations:
            check_allocation(allocation)
        for reuse in self.reuses:
            check_reuse(reuse)
        for solver in self.solvers:
            solver_of(solver)

    def choices(self, pipe: FixedPointDiTPipeline, scale: float) -> Iterator[tuple[int, Choices, bool]]:
        """Budgets, how to draw from a model, and whether that is a tuned plan. Of an explicit network only the budget,
        the scheduler and the seed say anything."""
        explicit = isinstance(pipe.transformer, DiT)
        of_solves = ([None], ["constant"], ["plain"], ["picard"]) if explicit else (
            self.iterations, self.allocations, self.reuses, self.solvers
        )  # fmt: skip
        for seed, budget, scheduler, iterations, allocation, reuse, solver in product(
            self.seeds, self.budgets, self.schedulers, *of_solves
        ):
            yield budget, Choices(budget, None, iterations, allocation, reuse, solver, scheduler=scheduler,
                          guidance_scale=scale, seed=seed), False  # fmt: skip
        for seed, budget in product(self.seeds, self.budgets if self.tuned else ()):
            if any((plan.budget, plan.guidance_scale) == (budget, scale) for plan in pipe.tuned_plans):
                chosen = pipe.tuned(budget, scale)
                if isinstance(chosen.get("iterations"), list):
                    chosen["iterations"] = tuple(chosen["iterations"])
                yield budget, Choices(**chosen, guidance_scale=scale, seed=seed), True


@dataclass(frozen=True)
class Point:
    """One request. `folder` is the model's; `label` is what it is called, and `digest` what its weights are."""

    label: str
    folder: str
    digest: str
    budget: int
    choices: Choices
    tuned: bool = False
    operations: int = 0
    parameters: int = 0  # before any are rounded to 8 bits, in which they are none to torch

    @classmethod
    def of(
        cls,
        label: str,
        folder: str,
        identity: str,
        pipe: FixedPointDiTPipeline,
        budget: int,
        choices: Choices,
        tuned: bool = False,
    ) -> "Point":
        """Raises ValueError for choices that cannot be."""
        plan = choices.plan(pipe)
        evaluations = 1 if choices.guidance_scale == 1 else 2
        operations = total(operations_of(pipe.transformer), plan) * evaluations
        parameters = sum(weight.numel() for weight in pipe.transformer.parameters())
        return cls(label, folder, identity, budget, choices, tuned, operations, parameters)

    @property
    def key(self) -> str:
        """The name of the point's files: what is not the default is in it."""
        c, parts = self.choices, [self.label, str(self.budget)]
        if self.tuned:
            parts += ["tuned", short_hash(replace(c, seed=0))]
        else:
            parts.append(str(c.scheduler).replace("+", "p"))
            parts += [] if c.num_inference_steps is None else [f"{c.num_inference_steps}-steps"]
            parts += [] if c.iterations is None else [counted(c.iterations)]
            parts += [] if c.allocation == "constant" else [c.allocation.replace(":", "_").replace("/", "_")]
            parts += [] if c.reuse == "plain" else [f"{c.reuse}-reuse"]
            parts += [] if c.solver == "picard" else [c.solver.replace(":", "_")]
        return "-".join([*parts, *([f"seed{c.seed}"] if c.seed else [])])


def counted(iterations: int | Sequence[int]) -> str:
    """Iterations as a part of a file's name."""
    return f"{iterations}-iterations" if isinstance(iterations, int) else f"iterations-{short_hash(iterations)}"


def short_hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:6]


def points_of(models: list[str], axes: Axes, settings: Settings) -> tuple[list[Point], list[str]]:
    """The points, cheapest first, and which of the combinations cannot be, with the reason."""
    axes.check()
    points, left_out = [], []
    for label, folder in labelled(models).items():
        pipe = load_pipeline(folder, "cpu", "float32")
        identity = digest(pipe.transformer)
        for budget in axes.budgets if axes.tuned else ():
            if (budget, settings.guidance_scale) not in {(p.budget, p.guidance_scale) for p in pipe.tuned_plans}:
                left_out.append(f"{label}-{budget}-tuned: the model has no such plan")
        points += distinct(label, folder, identity, pipe, axes.choices(pipe, settings.guidance_scale), left_out)
    if not points:
        raise ValueError("none of these points can be: " + "; ".join(left_out))
    return sorted(points, key=lambda point: (point.budget, point.operations)), left_out


def distinct(
    label: str,
    folder: str,
    identity: str,
    pipe: FixedPointDiTPipeline,
    wanted: Iterable[tuple[int, Choices, bool]],
    left_out: list[str],
) -> list[Point]:
    """The points of one model, each plan once. What cannot be is added to `left_out`, with the reason."""
    points: dict[Any, Point] = {}
    for budget, choices, tuned in wanted:
        try:
            plan, point = choices.plan(pipe), Point.of(label, folder, identity, pipe, budget, choices, tuned)
        except ValueError as error:
            left_out.append(f"{Point(label, folder, '', budget, choices, tuned).key}: {error}")
            continue
        alike = (plan, replace(choices, iterations=None, allocation="constant"), tuned)
        if alike in points:
            left_out.append(f"{point.key}: the same plan as another")
        points.setdefault(alike, point)
    return list(points.values())


def labelled(models: list[str]) -> dict[str, str]:
    """label -> model folder, of words like PATH or LABEL=PATH. Raises ValueError for labels that are not unique."""
    found: dict[str, str] = {}
    for word in models:
        label, equals, place = ("", "", "") if Path(word).exists() else word.partition("=")
        folder = model_folder(place if equals else word)
        if not equals:
            path = Path(word)
            label = path.resolve().parent.name if path.name in ("pipeline", "run") else path.name
        if not label or set(label) & set('/\\:*?"<>|'):
            raise ValueError(f"{label!r} cannot name a model: choose another, LABEL=PATH")
        if label in found:
            raise ValueError(f"two models are called {label}: name them apart, LABEL=PATH")
        found[label] = folder
    return found
