"""When to stop. How a step is made is the solver's matter, how to differentiate the gradient's."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Stopping(Protocol):
    """What the loop asks of a stopping rule."""

    @property
    def max_iterations(self) -> int:
        """The loop never runs longer than this."""

    @property
    def reads_residual(self) -> bool:
        """Whether `unfinished` has to be asked, which costs a synchronisation with the device per iteration."""

    def unfinished(self, residual: Tensor) -> Tensor:
        """Which samples go on, as booleans (batch,), given the relative residual (batch,) of this iteration."""


@dataclass(frozen=True)
class FixedIterations:
    """Exactly `n` iterations for every sample. Never reads a tensor, so the device is never waited for.

    Raises ValueError for a negative or fractional n.
    """

    n: int

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 0:
            raise ValueError(f"iterations must be an integer of at least 0, not {self.n!r}")

    @property
    def max_iterations(self) -> int:
        return self.n

    @property
    def reads_residual(self) -> bool:
        return False

    def unfinished(self, residual: Tensor) -> Tensor:
        return residual == residual  # all but the broken


@dataclass(frozen=True)
class Tolerance:
    """Stop a sample once |f(z) - z| <= relative |f(z)|, or after `max_iterations`. Each sample stops on its own.

    Raises ValueError unless relative > 0 and max_iterations >= 1.
    """

    relative: float
    max_iterations: int

    def __post_init__(self) -> None:
        if not self.relative > 0:
            raise ValueError(f"relative tolerance is {self.relative}; it must be above 0, e.g. 1e-3")
        if not isinstance(self.max_iterations, int) or self.max_iterations < 1:
            raise ValueError(f"max_iterations is {self.max_iterations}; it must be an integer of at least 1")

    @property
    def reads_residual(self) -> bool:
        return True

    def unfinished(self, residual: Tensor) -> Tensor:
        return residual > self.relative  # a NaN compares false: such a sample is finished too
