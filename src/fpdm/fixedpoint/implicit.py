"""The gradient of the implicit function theorem: a second fixed point, solved in the backward pass.

    v   the gradient of the loss with respect to z*
    g   (I - J^T)^-1 v, that is the solution of g = v + J^T g,  J = df/dz at z*

The value that is returned is f(z*, context), differentiated once with g in the place of v: with respect to the context
and the weights that gives the exact gradient (Bai, Kolter and Koltun 2019, theorem 1). Stored is one evaluation of f.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpdm.fixedpoint.gradients import two_phases
from fpdm.fixedpoint.products import without_parameters
from fpdm.fixedpoint.solve import Function, Solution, solve
from fpdm.fixedpoint.solvers import Anderson, Picard, Solver
from fpdm.fixedpoint.stopping import FixedIterations, Stopping, Tolerance


@dataclass(frozen=True)
class Implicit:
    """Solve without gradient as the stopping rule says, apply f once with it, and solve for g in the backward pass.

    solver          of the backward pass
    tolerance       its relative residual |v + J^T g - g| / |v + J^T g|, per sample
    max_iterations  its limit, each a product with J^T; one that does not get there goes on with its last g,
                    one that diverges with its best

    It is exact as far as z* is a fixed point and g is solved for, and has no derivative of its own: with
    `create_graph=True` the backward pass raises RuntimeError. While it runs, other threads of the process must not run
    theirs (see `products`). Raises ValueError for values out of range.
    """

    solver: Solver = Anderson()
    tolerance: float = 1e-3
    max_iterations: int = 30

    def __post_init__(self) -> None:
        Tolerance(self.tolerance, self.max_iterations)

    def draw(self, generator: torch.Generator) -> "Implicit":
        return self

    def differentiated(self, most: int) -> range:
        return range(most + 1, most + 2)

    def solve(
        self, f: Function, z: Tensor, context: Any, *, solver: Solver, stopping: Stopping, keep: tuple[int, ...] = ()
    ) -> Solution:
        def last(z: Tensor, context: Any) -> Tensor:
            """f where autograd is told of it, which is once."""
            return self._applied(f, z, context) if torch.is_grad_enabled() else f(z, context)

        return two_phases(last, z, context, solver, stopping, FixedIterations(1), keep, Picard())

    def _applied(self, f: Function, z: Tensor, context: Any) -> Tensor:
        z = z.detach().requires_grad_()
        fz = f(z, context)
        value = fz.view_as(fz)  # a tensor apart, so that the products below do not meet its hook
        value.register_hook(lambda v: self._backward(fz, z, v))
        return value

    def _backward(self, fz: Tensor, z: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("the implicit gradient has no derivative (create_graph=True): take another, as Unroll()")

        def moved(g: Tensor, places: Tensor) -> Tensor:
            """v + J^T g of the samples at `places`: the graph is of the whole batch, so the others go along as 0."""
            whole = torch.zeros_like(fz).index_copy(0, places, g.to(fz.dtype))
            with without_parameters():
                (product,) = torch.autograd.grad(fz, z, whole, retain_graph=True)
            return v[places] + product.to(v.dtype)[places]

        with torch.no_grad():
            stopping = Tolerance(self.tolerance, self.max_iterations)
            places = torch.arange(len(v), device=v.device)
            return solve(moved, v, places, solver=self.solver, stopping=stopping, record=False).value.to(v.dtype)
