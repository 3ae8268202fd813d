"""Who may spend how many iterations, when samples stop on their own.

Under a tolerance a sample stops early at an easy timestep. What it leaves over is its own, for later timesteps, so that
in all it never spends more than was planned, and never what another one saved.
"""

from fpdm.fixedpoint import FixedIterations, Stopping, Tolerance, check_tolerance
from fpdm.sampling.guidance import Guidance


class Purse:
    """The iterations that are left over, image by image.

    images     how many; under guidance each has a conditional and an unconditional evaluation, with a purse of its own
    tolerance  relative residual at which a sample stops; None to spend exactly what is planned
    pooled     whether what is left over is shared out evenly over the batch. The images then depend on their batch

    Raises ValueError for a tolerance that is not above 0, and for `pooled` without one.
    """

    def __init__(self, images: int, tolerance: float | None = None, pooled: bool = False):
        if tolerance is not None:
            check_tolerance(tolerance)
        elif pooled:
            raise ValueError("pooled shares out what a tolerance leaves over: give a tolerance, e.g. 0.02")
        self.images, self.tolerance, self.pooled = images, tolerance, pooled
        self.left = [0] * (2 * images)

    def stopping(self, planned: int, guidance: Guidance, guided: bool) -> Stopping:
        """When the solves at a timestep of so many planned iterations stop."""
        counts = self.planned(planned, guidance, guided)
        if self.tolerance is None:
            return FixedIterations(counts[0] if len(set(counts)) == 1 else counts)
        kept = self.left
        if self.pooled:
            halves = [self.left[: self.images], self.left[self.images :]]
            kept = [sum(half) // self.images for half in halves for _ in range(self.images)]
        return Tolerance(self.tolerance, tuple(n + more for n, more in zip(counts, kept, strict=False)))

    def planned(self, planned: int, guidance: Guidance, guided: bool) -> tuple[int, ...]:
        """The planned iterations of each evaluation at a timestep, conditional ones first."""
        conditional = (planned,) * self.images
        return conditional + (guidance.iterations(planned),) * self.images if guided else conditional

    def spend(self, planned: int, guidance: Guidance, guided: bool, spent: list[int]) -> None:
        """Take what was spent from what was there."""
        for place, (n, used) in enumerate(zip(self.planned(planned, guidance, guided), spent, strict=True)):
            self.left[place] += n - used
