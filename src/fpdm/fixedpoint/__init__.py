"""Fixed points z = f(z): how to step, when to stop, how to differentiate. Nothing here knows of images."""

from fpdm.fixedpoint.gradients import (
    Gradient,
    JacobianFree,
    MultiStepJacobianFree,
    Phantom,
    StochasticJacobianFree,
    Unroll,
)
from fpdm.fixedpoint.implicit import Implicit
from fpdm.fixedpoint.products import only_of_inputs
from fpdm.fixedpoint.running import Running, Status, relative_residual, residuals
from fpdm.fixedpoint.solve import Solution, solve
from fpdm.fixedpoint.solvers import Anderson, Broyden, Picard, Solver
from fpdm.fixedpoint.spec import Solve
from fpdm.fixedpoint.stopping import FixedIterations, Stopping, Tolerance, check_tolerance
from fpdm.fixedpoint.tracing import is_transformed
from fpdm.fixedpoint.trees import detach, joined, mapped, overwrite, put, select

__all__ = [
    "Anderson",
    "Broyden",
    "FixedIterations",
    "Gradient",
    "Implicit",
    "JacobianFree",
    "MultiStepJacobianFree",
    "Phantom",
    "Picard",
    "Running",
    "Solution",
    "Solve",
    "Solver",
    "Status",
    "StochasticJacobianFree",
    "Stopping",
    "Tolerance",
    "Unroll",
    "check_tolerance",
    "detach",
    "is_transformed",
    "joined",
    "mapped",
    "only_of_inputs",
    "overwrite",
    "put",
    "relative_residual",
    "residuals",
    "select",
    "solve",
]
