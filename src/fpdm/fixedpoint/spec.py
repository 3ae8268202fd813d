"""A solve as a value: solver, stopping rule and gradient, to be handed to a network."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fpdm.fixedpoint.gradients import Gradient, Unroll
from fpdm.fixedpoint.solve import Function, Solution
from fpdm.fixedpoint.solvers import Picard, Solver
from fpdm.fixedpoint.stopping import FixedIterations, Stopping


@dataclass(frozen=True, kw_only=True)
class Solve:
    """How a fixed point is to be found, when to stop, and how to differentiate through it.

    `exits` names iterations (from 1) whose iterates are decoded as well: the early exits of the network. Those that the
    solve does not reach are left out; those of iterations without gradient carry none into the fixed point layer.
    """

    stopping: Stopping = FixedIterations(1)
    solver: Solver = Picard()
    gradient: Gradient = Unroll()
    exits: tuple[int, ...] = ()

    def __call__(self, f: Function, z: Tensor, context: Any) -> Solution:
        return self.gradient.solve(f, z, context, solver=self.solver, stopping=self.stopping, keep=self.exits)
