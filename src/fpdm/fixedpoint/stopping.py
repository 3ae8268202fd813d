"""When to stop. How a step is made is the solver's matter, how to differentiate the gradient's."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol

from torch import Tensor

Counts = int | Sequence[int]  # of all samples, or one for each


class Stopping(Protocol):
    """What the loop asks of a stopping rule."""

    @property
    def limit(self) -> Counts:
        """The most iterations that a sample may spend: one number for all, or one for each."""

    @property
    def reads_residual(self) -> bool:
        """Whether `unfinished` has to be asked, which costs a synchronisation with the device per iteration."""

    def unfinished(self, residual: Tensor) -> Tensor:
        """Which samples are not solved yet, as booleans (batch,), given their relative residuals (batch,)."""


@dataclass(frozen=True)
class FixedIterations:
    """Exactly `n` iterations for every sample, or `n[i]` for sample i. Never reads a tensor, so the device is never
    waited for.

    Raises ValueError for a negative or fractional n.
    """

    n: Counts

    def __post_init__(self) -> None:
        check_counts("iterations", self.n, 0)

    @property
    def limit(self) -> Counts:
        return self.n

    @property
    def reads_residual(self) -> bool:
        return False

    def unfinished(self, residual: Tensor) -> Tensor:
        return residual == residual  # all but the broken


@dataclass(frozen=True)
class Tolerance:
    """Stop a sample once |f(z) - z| <= relative |f(z)|, or after `max_iterations`, which may be one number for each
    sample. Each sample stops on its own.

    Raises ValueError unless relative > 0 and max_iterations >= 1.
    """

    relative: float
    max_iterations: Counts

    def __post_init__(self) -> None:
        check_tolerance(self.relative)
        check_counts("max_iterations", self.max_iterations, 1)

    @property
    def limit(self) -> Counts:
        return self.max_iterations

    @property
    def reads_residual(self) -> bool:
        return True

    def unfinished(self, residual: Tensor) -> Tensor:
        return residual > self.relative  # a NaN compares false: such a sample is finished too


def check_tolerance(relative: float) -> None:
    if not isinstance(relative, Real) or not 0 < relative < float("inf"):
        raise ValueError(f"relative tolerance is {relative!r}; it must be above 0, e.g. 1e-3")


def check_counts(name: str, counts: Counts, least: int) -> None:
    listed = [counts] if isinstance(counts, Integral) else counts
    wrong = (
        [n for n in listed if not isinstance(n, Integral) or n < least] if isinstance(listed, Sequence) else [counts]
    )
    if wrong:
        raise ValueError(f"{name} must be an integer of at least {least}, or one for each sample, not {wrong[0]!r}")
