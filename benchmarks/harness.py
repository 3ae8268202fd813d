"""Times compared in pairs: several ways to do a thing take turns in one process, and ratios are of neighbours in time.

What slows the machine down for a while slows down all ways alike, so that a ratio means something where seconds do not.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

ROUNDS, WARM = 15, 2


@dataclass(frozen=True)
class Timing:
    """Of one way.

    seconds    the median
    ratio      of the first way's seconds to this one's, by round: the median; above 1 this one is faster
    low, high  the quartiles of the ratios
    """

    seconds: float
    ratio: float
    low: float
    high: float


def compare(ways: dict[str, Callable[[], Any]], rounds: int = ROUNDS, device: str = "cpu") -> dict[str, Timing]:
    """Time the ways in turns, so many rounds after two that are not counted. The order turns round in every round:
    nobody always follows the one that leaves the caches as it likes."""
    names, seconds = list(ways), {name: list[float]() for name in ways}
    for number in range(WARM + rounds):
        for name in names if number % 2 else reversed(names):
            started = time.perf_counter()
            ways[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= WARM:
                seconds[name].append(time.perf_counter() - started)
    first = seconds[names[0]]
    found = {}
    for name in names:
        ratios = [base / own for base, own in zip(first, seconds[name], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        found[name] = Timing(median(seconds[name]), median(ratios), low, high)
    return found


def bandwidth(device: str = "cpu", megabytes: int = 256) -> float:
    """Bytes per second of a copy within memory, read and written both counted: the best of five."""
    source = torch.ones(megabytes * 2**18, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() * 4 / best
