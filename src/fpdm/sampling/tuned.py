"""Plans that were found to draw the best images of a model at a budget, kept beside its weights in plans.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fpdm.files import read_json, write_json
from fpdm.names import PLANNED
from fpdm.sampling.budget import EVERY_CALL, Cost, positive
from fpdm.sampling.reuse import check_reuse
from fpdm.sampling.schedulers import SCHEDULERS
from fpdm.sampling.solvers import solver_of

FILE = "plans.json"


@dataclass(frozen=True)
class TunedPlan:
    """What is best at a budget.

    budget      block passes per image
    iterations  per timestep, in sampling order; None at every timestep of a network without iterations
    scheduler   by name
    reuse       what a solve starts from
    solver      by name
    guidance_scale  that it was tuned with; 1 for none
    found       how it was found: data, number of samples, distances of this plan and of the best made by hand
    """

    budget: int
    iterations: tuple[int | None, ...]
    scheduler: str
    reuse: str
    solver: str
    found: dict[str, Any]
    guidance_scale: float = 1.0

    def choices(self, budget: int, cost: Cost, calls: range = EVERY_CALL) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call: this plan at its own budget, or its like at another one, with more
        or fewer timesteps of as many iterations on average, as far as they fit. `cost` is that of a call of the
        network, and `calls` how many of them its scheduler may make."""
        chosen = {"scheduler": self.scheduler, "reuse": self.reuse, "solver": self.solver}
        known = [n for n in self.iterations if n is not None]
        if budget == self.budget:
            own: dict[str, Any] = {"iterations": known} if known else {"num_inference_steps": len(self.iterations)}
            left = budget - sum(cost.passes(n) for n in self.iterations)
            return chosen | own | ({"budget": budget} if 0 <= left < (cost.per_iteration or cost.fixed) else {})
        if not known:
            return chosen | {"budget": budget}
        most = (budget // calls.start - cost.fixed) // cost.per_iteration
        return chosen | {"budget": budget, "iterations": max(1, min(most, round(sum(known) / len(known))))}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TunedPlan":
        """Raises ValueError for what is not of a plan."""
        if not isinstance(values, dict) or {"guidance_scale", *values} != {field.name for field in fields(cls)}:
            raise ValueError(f"a plan has {', '.join(field.name for field in fields(cls))}")
        counts = values["iterations"]
        if not isinstance(values["budget"], int) or values["budget"] < 1:
            raise ValueError(f"budget is {values['budget']!r}")
        numbers = isinstance(counts, list) and all(isinstance(n, int) and n >= 1 for n in counts)
        if not counts or not (numbers or counts == [None] * len(counts)):
            raise ValueError(f"iterations are {counts!r}")
        if values["scheduler"] not in SCHEDULERS or not isinstance(values["solver"], str):
            raise ValueError(f"scheduler is {values['scheduler']!r}, solver {values['solver']!r}")
        if not isinstance(values.get("guidance_scale", 1.0), int | float):
            raise ValueError(f"guidance_scale is {values['guidance_scale']!r}")
        check_reuse(values["reuse"])
        solver_of(values["solver"])
        return cls(**{**values, "iterations": tuple(counts)})


def nearest_plan(plans: Sequence[TunedPlan], budget: int, guidance_scale: float = 1.0) -> TunedPlan | None:
    """Of the plans tuned with this guidance, the one whose budget is nearest, as a ratio; of two as near, the smaller.
    None where there are none.

    Raises ValueError for a budget below 1.
    """
    positive("budget", budget)
    fitting = [plan for plan in plans if plan.guidance_scale == guidance_scale]
    return min(fitting, key=lambda plan: (abs(math.log(plan.budget / budget)), plan.budget), default=None)


def plan_for(plans: Sequence[TunedPlan], call: Mapping[str, Any]) -> TunedPlan | None:
    """The tuned plan that a call of the pipeline follows, told by its keyword arguments: the one nearest to its budget,
    where that is all that it says of a plan. None where it says more, names no budget, or there is none for its
    guidance.

    Raises ValueError for a budget that cannot be, as `make_plan` does.
    """
    said = call.get("pooled") or any(call.get(name) is not None for name in PLANNED)
    budget = positive("budget", call.get("budget"))
    return None if said or budget is None else nearest_plan(plans, budget, call.get("guidance_scale", 1.0))


def load_plans(folder: Path) -> tuple[TunedPlan, ...]:
    """The plans in a model's folder, by budget. Raises ValueError if the file is damaged."""
    path = folder / FILE
    if not path.is_file():
        return ()
    try:
        listed = read_json(path)
        if not isinstance(listed, list):
            raise ValueError("it is not a list")
        return tuple(sorted(map(TunedPlan.from_dict, listed), key=lambda plan: plan.budget))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold plans: {error}. Delete it, and tune again") from error


def add_plans(folder: Path, plans: Sequence[TunedPlan]) -> None:
    """Keep plans beside a model, in the place of those of the same budgets and guidance."""
    kept = {(plan.budget, plan.guidance_scale): plan for plan in (*load_plans(folder), *plans)}
    save_plans(folder, [kept[key] for key in sorted(kept)])


def save_plans(folder: Path, plans: Sequence[TunedPlan]) -> None:
    """Make these the plans of the model in a folder, and no others."""
    if plans:
        write_json(folder / FILE, [asdict(plan) for plan in plans])
    else:
        (folder / FILE).unlink(missing_ok=True)
