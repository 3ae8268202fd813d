"""The seconds of a training, and how many of them it waits for its data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

MUCH = 0.2  # of the time, waited for data


class Clock:
    """Seconds since training began; since the last lap, steps, seconds, and of these such waited for data."""

    def __init__(self, step: int):
        self.began = self.last = time.perf_counter()
        self.step, self.waited = step, 0.0

    @property
    def total(self) -> float:
        return time.perf_counter() - self.began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens within is waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def lap(self, step: int) -> tuple[int, float, float]:
        """Steps, seconds and seconds waited since the last lap."""
        now = time.perf_counter()
        lap = step - self.step, max(1e-9, now - self.last), self.waited
        self.step, self.last, self.waited = step, now, 0.0
        return lap


def advice(share: float, workers: int) -> str:
    """What follows the images per second in the bar: nothing where a small share of the time goes by waiting."""
    if share < MUCH:
        return ""
    return f", {share:.0%} of the time waiting for images: try --workers {2 * workers or 2}"
