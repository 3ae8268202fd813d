"""How images are drawn under a budget: plan, sampler, report."""

from fpdm.sampling.budget import (
    ALLOCATIONS,
    DEFAULT_BUDGET,
    EVERY_CALL,
    Cost,
    Plan,
    apportion,
    check_allocation,
    fitting,
    listed,
    make_plan,
)
from fpdm.sampling.continuous import check_shared, continuous
from fpdm.sampling.guidance import Guidance
from fpdm.sampling.operations import cost_of, operations_of, original, total
from fpdm.sampling.profile import Profile, measure_profile
from fpdm.sampling.report import Report
from fpdm.sampling.reuse import REUSE, check_reuse
from fpdm.sampling.sampler import Call, answered, course, image_generators, initial_noise, sample
from fpdm.sampling.schedulers import SCHEDULERS, Stepper, calls_of, trailing_timesteps
from fpdm.sampling.solvers import SOLVERS, solver_of
from fpdm.sampling.spending import Purse
from fpdm.sampling.timing import Seconds, measure_seconds
from fpdm.sampling.tuned import TunedPlan, add_plans, load_plans, nearest_plan, plan_for, save_plans

__all__ = [
    "ALLOCATIONS",
    "DEFAULT_BUDGET",
    "EVERY_CALL",
    "REUSE",
    "SCHEDULERS",
    "SOLVERS",
    "Call",
    "Cost",
    "Guidance",
    "Plan",
    "Profile",
    "Purse",
    "Report",
    "Seconds",
    "Stepper",
    "TunedPlan",
    "add_plans",
    "answered",
    "apportion",
    "calls_of",
    "check_allocation",
    "check_reuse",
    "check_shared",
    "continuous",
    "cost_of",
    "course",
    "fitting",
    "image_generators",
    "initial_noise",
    "listed",
    "load_plans",
    "make_plan",
    "measure_profile",
    "measure_seconds",
    "nearest_plan",
    "operations_of",
    "original",
    "plan_for",
    "sample",
    "save_plans",
    "solver_of",
    "total",
    "trailing_timesteps",
]
