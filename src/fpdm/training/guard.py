"""Steps whose gradient is of no use are left out, without asking the device whether there were any.

A gradient is of no use if it is not finite, or if its norm is `EXPLODED` times the mean of the norms before. The
optimiser is told on the device (as a gradient scaler tells it), so no step waits for the verdict.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EXPLODED = 100.0
MEMORY = 100  # steps over which the mean of the norms reaches, and before which nothing counts as exploded


class Diverged(FloatingPointError):
    """Too many steps in a row whose gradient was of no use: `what`, and in its text what to do."""

    def __init__(self, in_a_row: int, first: int, timesteps: list[int], run: Path):
        self.what = (
            f"the gradients of {in_a_row} steps in a row are not finite, or {EXPLODED:g} times as large as before. The "
            f"first was that of step {first}, whose batch has timesteps {timesteps[0]} to {timesteps[-1]}"
        )
        self.run, self.first = run, first
        super().__init__(self.advice("Go on from there with --on-divergence rollback, or start anew"))

    def advice(self, then: str) -> str:
        """What happened, and what to do: `then`, and how."""
        return (
            f"{self.what}; see it with `fpdm replay {self.run} --step {self.first}`. What was saved before is as it "
            f"was. {then} under another --name with a lower --lr, a longer --warmup, a smaller --grad-clip or "
            "--mixed-precision no"
        )


class Guard:
    """The verdicts of a run. All of its numbers are one tensor on the device, (5,): the mean of the norms, steps judged
    useful, useless ones in a row and the first of them, useless ones in all."""

    def __init__(self, device: torch.device, patience: int):
        """`patience` useless steps in a row are remembered until somebody looks."""
        self.patience = patience
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.numbers = torch.zeros(5, device=device, dtype=dtype)

    @torch.no_grad()
    def judge(self, norm: Tensor, step: int) -> Tensor:
        """Whether the gradient with this norm is of no use, as 1.0 or 0.0, a float32 scalar on the device. Alike on all
        processes, whose gradients are alike."""
        mean, seen, in_a_row, first, skipped = self.numbers
        norm = norm.to(self.numbers.dtype)
        bad = ~norm.isfinite() | ((seen >= MEMORY) & (norm > EXPLODED * mean))
        weight = 1 / (seen.clamp_max(MEMORY - 1) + 1)
        first = torch.where(bad & (in_a_row == 0), torch.full_like(first, step), first)
        over = torch.where(in_a_row >= self.patience, in_a_row, 0.0)
        in_a_row = torch.where(bad, in_a_row + 1, over)
        mean = mean.lerp(torch.where(bad, mean, norm), weight)
        self.numbers = torch.stack([mean, seen + ~bad, in_a_row, first, skipped + bad])
        return bad.float()

    def run_of_bad_steps(self) -> tuple[int, int]:
        """How many steps in a row were left out, and the first of them: up to now, or when patience ended.

        Waits for the device.
        """
        _, _, in_a_row, first, _ = self.numbers.tolist()
        return int(in_a_row), int(first)

    def skipped(self) -> int:
        """How many steps were left out in all. Waits for the device."""
        return int(self.numbers[4])

    @staticmethod
    def in_trouble(state: Any) -> bool:
        """Whether the step before `state` was kept was left out."""
        return bool(state) and state[2] > 0

    def state(self) -> Any:
        return self.numbers.tolist()

    def restore(self, state: Any) -> None:
        self.numbers.copy_(torch.tensor(state, dtype=self.numbers.dtype))
