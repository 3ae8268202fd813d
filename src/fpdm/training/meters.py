"""What the log tells of its steps: means of numbers that stay on the device until a line is due."""

from typing import Any

import torch
from torch import Tensor


class Meters:
    """Sums and counts of named numbers since the last line of the log.

    A number counts in the steps that have it: a step that was skipped has none, one without an early exit no `exit`.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names = names
        self.sums = torch.zeros(2, len(names), device=device)  # of the values, and how many there were

    def add(self, values: dict[str, Tensor], counts: Tensor) -> None:
        """Add a step's `values`, scalars; `counts`, a scalar, is 1, or 0 for a step that was skipped."""
        for name, value in values.items():
            place = self.names.index(name)
            self.sums[0, place] += torch.where(counts > 0, value.detach().float(), 0.0)
            self.sums[1, place] += counts

    def means(self, sums: Tensor) -> dict[str, float]:
        """The mean of every number that there is any of, from `sums` like this object's own."""
        totals, counts = sums.tolist()
        return {name: total / n for name, total, n in zip(self.names, totals, counts, strict=True) if n}

    def state(self) -> Any:
        return self.sums.tolist()

    def restore(self, state: Any) -> None:
        self.sums.copy_(torch.tensor(state))
