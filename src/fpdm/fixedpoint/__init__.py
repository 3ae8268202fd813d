"""Fixed points z = f(z): how to step, when to stop, how to differentiate. Nothing here knows of images."""

from fpdm.fixedpoint.gradients import (
    Gradient,
    JacobianFree,
    MultiStepJacobianFree,
    StochasticJacobianFree,
    Unroll,
    detach,
)
from fpdm.fixedpoint.solve import Solution, Status, relative_residual, solve
from fpdm.fixedpoint.solvers import Picard, Solver
from fpdm.fixedpoint.spec import Solve
from fpdm.fixedpoint.stopping import FixedIterations, Stopping, Tolerance

__all__ = [
    "FixedIterations",
    "Gradient",
    "JacobianFree",
    "MultiStepJacobianFree",
    "Picard",
    "Solution",
    "Solve",
    "Solver",
    "Status",
    "StochasticJacobianFree",
    "Stopping",
    "Tolerance",
    "Unroll",
    "detach",
    "relative_residual",
    "solve",
]
