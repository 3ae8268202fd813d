"""What one timestep's fixed point tells of the next: where a solve starts.

Solutions lie on a smooth curve over the noise levels. "plain" starts a solve from the last solution; "linear" and
"quadratic" run the curve on through the last two or three. None of them costs a block pass.
"""

import math

import torch
from torch import Tensor

from fpdm.names import unknown

POINTS = {"none": 0, "plain": 1, "linear": 2, "quadratic": 3}  # how many solutions are remembered
REUSE = tuple(POINTS)


class Carry:
    """The solutions that a sampling remembers, and the start of the next solve that follows from them.

    Time is the angle of the noise level, arccos(sqrt(alpha_bar)): 0 for a clean image, pi/2 for noise. Unlike the
    logarithm of the signal-to-noise ratio it is bounded, and unlike t it does not depend on the noise schedule.

    Raises ValueError for an unknown kind.
    """

    def __init__(self, kind: str):
        self.most = POINTS[check_reuse(kind)]
        self.times: list[float] = []
        self.solutions: list[Tensor] = []

    def start(self, alpha_bar: float, rows: int) -> Tensor | None:
        """Where to start at a noise level (rows, N, D), None to start from scratch. Where guidance sets in, its second
        half begins where the first one was, and where it ends the first one goes on."""
        if not self.solutions:
            return None
        shares = lagrange(self.times, angle(alpha_bar))
        if len(shares) == 1:
            return self._fitted(self.solutions[0], rows)
        parts = [share * self._fitted(z, rows).float() for share, z in zip(shares, self.solutions, strict=True)]
        return torch.stack(parts).sum(0)

    def add(self, alpha_bar: float, solution: Tensor) -> None:
        """Remember a solution (rows, N, D), in the place of one at the same noise level."""
        time = angle(alpha_bar)
        if self.times and self.times[-1] == time:
            del self.times[-1], self.solutions[-1]
        if self.most:
            self.times, self.solutions = [*self.times, time][-self.most :], [*self.solutions, solution][-self.most :]

    def _fitted(self, solution: Tensor, rows: int) -> Tensor:
        return solution[:rows] if len(solution) >= rows else torch.cat([solution, solution])


def check_reuse(kind: str | bool) -> str:
    """The name of a kind of reuse; True is "plain", False "none". Raises ValueError for others."""
    kind = {True: "plain", False: "none"}[kind] if isinstance(kind, bool) else kind
    if not isinstance(kind, str):
        raise ValueError(f"reuse is {kind!r}; it must be one of {', '.join(POINTS)}")
    if kind not in POINTS:
        raise ValueError(unknown("reuse", kind, POINTS))
    return kind


def angle(alpha_bar: float) -> float:
    """The angle of a noise level: cos^2 of it is alpha_bar."""
    return math.acos(math.sqrt(min(1.0, max(0.0, alpha_bar))))


def lagrange(times: list[float], time: float) -> list[float]:
    """The weights of values at `times` in the value at `time` of the polynomial through them; they sum to 1."""
    return [
        math.prod((time - other) / (own - other) for j, other in enumerate(times) if j != i)
        for i, own in enumerate(times)
    ]
