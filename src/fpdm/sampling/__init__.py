"""How images are drawn under a budget: plan, sampler, report."""

from fpdm.sampling.budget import ALLOCATIONS, DEFAULT_BUDGET, Cost, Plan, apportion, make_plan
from fpdm.sampling.operations import operations_of, total
from fpdm.sampling.report import Report
from fpdm.sampling.sampler import cost_of, image_generators, initial_noise, sample
from fpdm.sampling.schedulers import SCHEDULERS, Stepper, trailing_timesteps

__all__ = [
    "ALLOCATIONS",
    "DEFAULT_BUDGET",
    "SCHEDULERS",
    "Cost",
    "Plan",
    "Report",
    "Stepper",
    "apportion",
    "cost_of",
    "image_generators",
    "initial_noise",
    "make_plan",
    "operations_of",
    "sample",
    "total",
    "trailing_timesteps",
]
