"""How to differentiate through a fixed point.

With z* = f(z*, c), the implicit function theorem gives dz*/dc = (I - J)^-1 df/dc, J = df/dz at z*. `Implicit` solves
the system with the inverse; the other methods replace it: by the identity (Jacobian-free, Fung et al. 2022), by the
first terms of its Neumann series (several steps, damped ones as phantom gradients), or by autograd over the whole loop
(unrolling).

A method has three parts. `draw` settles what is random in it, once per training step and outside the network, so that
all processes draw the same; `solve` runs the loop; `differentiated` says which of its iterates have a gradient, for
objectives on early exits. Adding a method is adding a class with these three.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fpdm.fixedpoint.solve import Function, Solution, solve
from fpdm.fixedpoint.solvers import Picard, Solver, check_damping
from fpdm.fixedpoint.stopping import FixedIterations, Stopping, check_counts
from fpdm.fixedpoint.trees import detach

NOT_DRAWN = (
    "the iteration counts of StochasticJacobianFree are not drawn yet: pass `gradient.draw(generator)`, with a "
    "generator that is the same on all processes"
)


class Gradient(Protocol):
    """What a solve asks of a method of differentiation."""

    def draw(self, generator: torch.Generator) -> "Gradient":
        """This method with every random choice made, from `generator` alone."""

    def solve(
        self, f: Function, z: Tensor, context: Any, *, solver: Solver, stopping: Stopping, keep: tuple[int, ...]
    ) -> Solution:
        """Solve z = f(z, context) from `z` (batch, ...) so that autograd sees this method's gradient."""

    def differentiated(self, most: int) -> range:
        """The iterates, counted from 1 to the last, whose gradients reach the fixed point layer; `most` is the limit of
        the stopping rule."""


@dataclass(frozen=True)
class Unroll:
    """Autograd through every iteration: the gradient of what was computed, at the memory of all of it.

    iterations  so many; None for as many as the stopping rule says

    Raises ValueError unless iterations >= 1.
    """

    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.iterations is not None:
            check_counts("iterations", self.iterations, 1)

    def draw(self, generator: torch.Generator) -> "Unroll":
        return self

    def differentiated(self, most: int) -> range:
        return range(1, 1 + (self.iterations or most))

    def solve(
        self, f: Function, z: Tensor, context: Any, *, solver: Solver, stopping: Stopping, keep: tuple[int, ...] = ()
    ) -> Solution:
        stopping = stopping if self.iterations is None else FixedIterations(self.iterations)
        return solve(f, z, context, solver=solver, stopping=stopping, keep=keep)


@dataclass(frozen=True)
class JacobianFree:
    """Jacobian-free backpropagation (Fung et al. 2022): solve without gradient, then apply f once with it.

    The solve without gradient follows the stopping rule, so an iteration more than it allows is spent in all.
    """

    def draw(self, generator: torch.Generator) -> "JacobianFree":
        return self

    def differentiated(self, most: int) -> range:
        return range(most + 1, most + 2)

    def solve(
        self, f: Function, z: Tensor, context: Any, *, solver: Solver, stopping: Stopping, keep: tuple[int, ...] = ()
    ) -> Solution:
        return two_phases(f, z, context, solver, stopping, FixedIterations(1), keep)


@dataclass(frozen=True)
class MultiStepJacobianFree:
    """`no_grad` iterations without gradient, then `with_grad` unrolled ones. It has its own counts: the stopping rule
    is not used. Raises ValueError unless no_grad >= 0 and with_grad >= 1."""

    no_grad: int
    with_grad: int = 1

    def __post_init__(self) -> None:
        if self.no_grad < 0 or self.with_grad < 1:
            raise ValueError(
                f"no_grad is {self.no_grad} and with_grad {self.with_grad}; they must be at least 0 and at least 1 "
                "(every parameter needs a gradient)"
            )

    def draw(self, generator: torch.Generator) -> "MultiStepJacobianFree":
        return self

    def differentiated(self, most: int) -> range:
        return range(self.no_grad + 1, self.no_grad + self.with_grad + 1)

    def solve(
        self, f: Function, z: Tensor, context: Any, *, solver: Solver, stopping: Stopping, keep: tuple[int, ...] = ()
    ) -> Solution:
        first, second = FixedIterations(self.no_grad), FixedIterations(self.with_grad)
        return two_phases(f, z, context, solver, first, second, keep)


@dataclass(frozen=True)
class Phantom:
    """The phantom gradient (Geng et al. 2021, unrolled form): solve without gradient as the stopping rule says, then
    unroll `steps` damped steps z <- (1 - damping) z + damping f(z), whatever the solver was.

    Damping below 1 weighs the terms of the Neumann series down, so that the gradient exists where f hardly contracts.
    Raises ValueError unless steps >= 1 and 0 < damping <= 1.
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_counts("steps", self.steps, 1)
        check_damping(self.damping)

    def draw(self, generator: torch.Generator) -> "Phantom":
        return self

    def differentiated(self, most: int) -> range:
        return range(most + 1, most + self.steps + 1)

    def solve(
        self, f: Function, z: Tensor, context: Any, *, solver: Solver, stopping: Stopping, keep: tuple[int, ...] = ()
    ) -> Solution:
        second = FixedIterations(self.steps)
        return two_phases(f, z, context, solver, stopping, second, keep, Picard(self.damping))


@dataclass(frozen=True)
class StochasticJacobianFree:
    """S-JFB (Bai and Melas-Kyriazi 2024): n ~ Uniform{no_grad} iterations without gradient, then m ~ Uniform{with_grad}
    unrolled ones. Both ranges include their ends. The defaults are the paper's, for XL.

    Raises ValueError for an empty range, a negative count, or with_grad starting below 1.
    """

    no_grad: tuple[int, int] = (0, 10)
    with_grad: tuple[int, int] = (1, 12)

    def __post_init__(self) -> None:
        for name, (low, high), least in (("no_grad", self.no_grad, 0), ("with_grad", self.with_grad, 1)):
            if not least <= low <= high:
                raise ValueError(f"{name} is ({low}, {high}); it must rise and start at {least} or above")

    def for_group(self, num_core: int) -> "StochasticJacobianFree":
        """The ranges for a shared group of `num_core` blocks: the upper ends divided by it (rounded, at least 1), so
        that equal training steps cost equal block passes."""

        def divided(low: int, high: int) -> tuple[int, int]:
            high = max(1, round(high / num_core)) if high else 0
            return min(low, high), high

        return StochasticJacobianFree(divided(*self.no_grad), divided(*self.with_grad))

    def draw(self, generator: torch.Generator) -> MultiStepJacobianFree:
        n, m = (
            int(torch.randint(low, high + 1, (), generator=generator)) for low, high in (self.no_grad, self.with_grad)
        )
        return MultiStepJacobianFree(n, m)

    def differentiated(self, most: int) -> range:
        raise ValueError(NOT_DRAWN)

    def solve(
        self, f: Function, z: Tensor, context: Any, *, solver: Solver, stopping: Stopping, keep: tuple[int, ...] = ()
    ) -> Solution:
        raise ValueError(NOT_DRAWN)


def two_phases(
    f: Function,
    z: Tensor,
    context: Any,
    solver: Solver,
    first: Stopping,
    second: Stopping,
    keep: tuple[int, ...],
    then: Solver | None = None,
) -> Solution:
    """Solve under `first` without gradient, then under `second` with it, from a detached z, with the solver `then`."""
    with torch.no_grad():
        begun = solve(f, z.detach(), detach(context), solver=solver, stopping=first, record=False, keep=keep)
    # Autocast caches its casts of the weights. Those made above carry no gradient, and would be used again below.
    torch.clear_autocast_cache()
    later = tuple(k - len(begun.residuals) for k in keep)
    ended = solve(f, begun.value, context, solver=then or solver, stopping=second, record=False, keep=later)
    return begun.then(ended)
