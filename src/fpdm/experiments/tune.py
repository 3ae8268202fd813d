"""The plan with the best images at each budget, for a trained model: found by measuring the model itself.

    1  Profile: how far a prediction is from the converged one, by noise level and iteration; from it, for every number
       of timesteps, the iterations that leave the smallest error (see `fpdm.sampling.profile`).
    2  Round 1: numbers of timesteps x schedulers, with equal iterations and with the profile's. Few images each.
    3  Round 2: the best with each scheduler, with every kind of reuse, another solver, and ramps of iterations.
    4  Round 3: the best with each scheduler, the two best of all, and the best plans by hand: those of equal iterations
       from round 1. All images.
    5  Round 4: the winner and the best by hand once more, with another seed. The winner of a search is partly lucky;
       the plan by hand is kept unless it is beaten here, too.

With few images a distance tells plans of one scheduler apart, which draw the same noise, but hardly schedulers: so each
has its plans in the last round.

Each round is a sweep in a folder of its own: OUT/round-1 and so on, with its points and its report. An interrupted one
goes on where it was.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fpdm.drawing import Choices, channels_of, check_precision, load_pipeline, schedule_of, side_of
from fpdm.evaluation import Evaluation
from fpdm.experiments.points import Axes, Point, Settings, labelled
from fpdm.experiments.sweep import check_claim, instrument_for, run_points
from fpdm.files import check_writable, read_json, shipped, write_json
from fpdm.models import DiT, FixedPointDiT
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.sampling import (
    REUSE,
    Profile,
    Stepper,
    TunedPlan,
    add_plans,
    calls_of,
    cost_of,
    fitting,
    image_generators,
    initial_noise,
    measure_profile,
)
from fpdm.weights import digest

MEANS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0)  # iterations per timestep, on average
SHARES = (0.25, 0.5, 1.0, 1.0)  # of all images, in each round
KEPT = 2  # of all, that go on to the last round in any case
PROFILED = 32  # images
PROFILE = "profile.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Tuner:
    """What a tuning works with. `profile` is None for a network without iterations, or whose iterations diverge."""

    label: str
    folder: str
    identity: str
    pipe: FixedPointDiTPipeline
    profile: Profile | None
    schedulers: tuple[str, ...]
    settings: Settings
    out: Path
    seed: int
    processes: int
    say: Callable[[str], None]

    def tune(self, budget: int) -> TunedPlan:
        """The best plan of a budget."""
        first = [choices for choices, _ in self.measured(1, budget, self.first(budget))]
        by_hand = [choices for choices in first if not isinstance(choices.iterations, tuple)]
        second = [choices for choices, _ in self.measured(2, budget, self.variants(best_of_each(first)))]
        listed = [*best_of_each(second), *second[:KEPT], *best_of_each(by_hand)]
        third = self.measured(3, budget, listed)
        winner, of_hand = third[0][0], next(choices for choices, _ in third if choices in by_hand)
        again = [replace(choices, seed=self.seed + 1) for choices in (winner, of_hand)]
        (best, row), *other = self.measured(4, budget, again)
        evaluation, plan = Evaluation.from_dict(row["evaluation"]), best.plan(self.pipe)
        hand = next((row for choices, row in other if choices == again[1]), row)
        found = {
            "data": Path(self.settings.data).name,
            "split": self.settings.split,
            "samples": evaluation.samples,
            "seed": self.seed + 1,
            "distance": evaluation.measures[0].name,
            "value": evaluation.measures[0].value,
            "by_hand": Evaluation.from_dict(hand["evaluation"]).measures[0].value,
            "plan_by_hand": f"{hand['plan']}, {hand['scheduler']}",
        }
        scale = self.settings.guidance_scale
        return TunedPlan(budget, plan.iterations, str(best.scheduler), best.reuse, best.solver, found, scale)

    def first(self, budget: int) -> list[Choices]:
        """Numbers of timesteps x schedulers, with equal iterations and with the profile's."""
        cost, found = cost_of(self.pipe.transformer), []
        basis = Choices(budget=budget, seed=self.seed, guidance_scale=self.settings.guidance_scale)
        if cost.per_iteration == 0:
            return [replace(basis, scheduler=name) for name in self.schedulers]
        for name, mean in product(self.schedulers, MEANS):
            calls = calls_of(self.pipe.scheduler, name)
            steps = fitting(int(budget / (cost.fixed + cost.per_iteration * mean)), calls)
            total = (budget - steps * cost.fixed) // cost.per_iteration
            if total < steps:
                continue
            equal = replace(basis, num_inference_steps=steps, scheduler=name)
            found.append(equal)
            if self.profile is not None:
                stepper = Stepper(self.pipe.scheduler, name, steps, self.pipe.transformer.config.learned_variance)
                counts = self.profile.iterations([stepper.level(call) for call in range(steps)], total)
                found.append(replace(equal, budget=None, num_inference_steps=None, iterations=counts))
        return self.possible(found) or self.possible([replace(basis, scheduler=name) for name in self.schedulers])

    def variants(self, chosen: Iterable[Choices]) -> list[Choices]:
        """Plans as they are, and with each other way to carry them out."""
        found = []
        for choices in chosen:
            found.append(choices)
            if isinstance(self.pipe.transformer, DiT):
                continue
            others = [{"reuse": kind} for kind in ("linear", "quadratic", "none")]
            others += [{"solver": "anderson:2"}, {"solver": "anderson:2", "reuse": "linear"}]
            if not isinstance(choices.iterations, tuple):
                others += [{"allocation": f"linear:{slope}"} for slope in (1, -1)]
            found += [replace(choices, **other) for other in others]  # type: ignore[arg-type]
        return self.possible(found)

    def possible(self, candidates: list[Choices]) -> list[Choices]:
        """Those that can be, each plan once."""
        kept: dict[Any, Choices] = {}
        for choices in candidates:
            try:
                plan = choices.plan(self.pipe)
            except ValueError:
                continue
            reuse = REUSE[min(REUSE.index(choices.reuse), plan.num_steps - 1)]  # there are no more solutions than that
            once = all(count in (None, 1) for count in plan.iterations)  # the first iteration of any solver is Picard's
            alike = (plan.iterations, choices.scheduler, reuse, "picard" if once else choices.solver)
            kept.setdefault(alike, choices)
        return list(kept.values())

    def measured(self, number: int, budget: int, candidates: list[Choices]) -> list[tuple[Choices, Row]]:
        """The candidates of a round and what was measured of them, the best first."""
        points = {}
        for choices in candidates:
            point = Point.of(self.label, self.folder, self.identity, self.pipe, budget, choices)
            points[point.key] = point
        settings, out = round_of(self.settings, number), self.out / f"round-{number}"
        self.say(f"{budget} block passes, round {number}: {len(points)} plans, {settings.num_images:,} images each")
        rows = {row["key"]: row for row in run_points(list(points.values()), settings, out, self.processes, self.say)}
        found = [(point.choices, rows[key]) for key, point in points.items()]
        return sorted(found, key=lambda pair: pair[1]["evaluation"]["measures"][0]["value"])


def round_of(settings: Settings, number: int) -> Settings:
    """The settings of a round: the first ones draw fewer images."""
    return replace(settings, num_images=max(50, int(settings.num_images * SHARES[number - 1])))


def best_of_each(ranked: list[Choices]) -> list[Choices]:
    """The first of each scheduler, of candidates from the best to the worst."""
    found: dict[str | None, Choices] = {}
    for choices in ranked:
        found.setdefault(choices.scheduler, choices)
    return list(found.values())


def tune_model(
    model: str,
    budgets: list[int],
    schedulers: list[str],
    settings: Settings,
    out: Path,
    seed: int = 0,
    processes: int = 1,
    say: Callable[[str], None] = print,
) -> list[TunedPlan]:
    """Tune a model and keep the plans in its folder, each as soon as it is found.

    model  a local run or pipeline folder, or LABEL=PATH

    Raises ValueError for a model that is not on this machine, and as `run_sweep` does.
    """
    ((label, folder),) = labelled([model]).items()
    if Path(folder) in shipped().values():
        raise ValueError(f"{label} is inside the package, with its plans: copy {folder} and tune the copy")
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder on this machine, in which plans could be kept: download it first")
    check_precision(settings.dtype)
    check_writable(Path(folder))  # where the plans are kept
    pipe = load_pipeline(folder, settings.device, "float32")
    identity = digest(pipe.transformer)
    for number in range(1, len(SHARES) + 1):  # what is there must fit, before hours are spent on it
        any_point = Point(label, folder, identity, budgets[0], Choices())
        check_claim(out / f"round-{number}", round_of(settings, number), [any_point])
    schedulers = usable(pipe, schedulers, min(budgets), say)
    instrument_for(round_of(settings, 1), side_of(pipe), channels_of(pipe))
    profile = profiled(pipe, identity, seed, out, say)
    tuner = Tuner(label, folder, identity, pipe, profile, tuple(schedulers), settings, out, seed, processes, say)
    plans = []
    for budget in budgets:
        plan = tuner.tune(budget)
        add_plans(Path(folder), [plan])
        plans.append(plan)
    return plans


def usable(pipe: FixedPointDiTPipeline, schedulers: list[str], budget: int, say: Callable[[str], None]) -> list[str]:
    """Those of the schedulers that fit the model. Raises ValueError for a name that means nothing, or if none does."""
    Axes([budget], schedulers).check()
    found, reasons = [], []
    for name in schedulers:
        try:
            pipe.plan(budget=budget, scheduler=name)
            found.append(name)
        except ValueError as error:
            reasons.append(str(error))
            say(f"left out: {name}: {error}")
    if not found:
        raise ValueError(f"none of the schedulers {', '.join(schedulers)} can be used: {'; '.join(reasons)}")
    return found


def profiled(
    pipe: FixedPointDiTPipeline, identity: str, seed: int, out: Path, say: Callable[[str], None]
) -> Profile | None:
    """The errors of the model's predictions by noise level and iteration, kept in `out`; None if it has no iterations,
    or they do not converge."""
    model = pipe.transformer
    if isinstance(model, DiT):
        return None
    assert isinstance(model, FixedPointDiT)
    of = {"model": identity, "noise_schedule": schedule_of(pipe), "seed": seed, "images": PROFILED}
    if (kept := kept_profile(out / PROFILE, of)) is not None:
        return kept
    say("measuring how far predictions are from converged ones")
    noise = initial_noise(model, image_generators(seed, range(PROFILED))).to(pipe.device)
    labels = torch.arange(PROFILED) % model.config.num_classes if model.config.num_classes else None
    try:
        profile = measure_profile(model, pipe.scheduler, noise, labels)
    except ValueError as error:
        say(f"no plans are derived from convergence: {error}")
        return None
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / PROFILE, {**of, "alpha_bar": profile.alpha_bar.tolist(), "errors": profile.errors.tolist()})
    return profile


def kept_profile(path: Path, of: Row) -> Profile | None:
    """The profile in a file, if it is of this model and seed, and whole."""
    with suppress(AttributeError, IndexError, OSError, ValueError, KeyError, TypeError):
        kept = read_json(path)
        if of.items() <= kept.items():
            levels, errors = np.array(kept["alpha_bar"], float), np.array(kept["errors"], float)
            return Profile(levels, errors) if errors.shape == (len(levels), errors.shape[1]) else None
    return None
