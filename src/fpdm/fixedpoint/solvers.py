"""How one iteration moves: from the pair (z, f(z)) to the next z.

A solver is a frozen dataclass. The loop in `solve` evaluates f once per iteration and hands the pair over, so every
iteration of every solver costs one evaluation. What a solver remembers (Anderson's history, say) is its state: a tuple
of tensors whose first axis is the batch, so that the samples of a batch stay independent.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

State = tuple[Any, ...]


class Solver(Protocol):
    """What the loop asks of a solver."""

    def init(self, z: Tensor) -> State:
        """The state before the first iteration from `z` (batch, ...)."""

    def step(self, z: Tensor, fz: Tensor, state: State) -> tuple[Tensor, State]:
        """The next iterate and state, from `z` and `fz` = f(z), both (batch, ...)."""


@dataclass(frozen=True)
class Picard:
    """z <- (1 - damping) z + damping f(z); the damping of Krasnoselskii and Mann, 1 being the plain iteration.

    Raises ValueError unless 0 < damping <= 1.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping is {self.damping}; it must lie in (0, 1], where 1 is the plain iteration")

    def init(self, z: Tensor) -> State:
        return ()

    def step(self, z: Tensor, fz: Tensor, state: State) -> tuple[Tensor, State]:
        return (fz if self.damping == 1 else z.lerp(fz, self.damping)), state
