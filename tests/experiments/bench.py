"""Stands in for drawing and measuring, so that a test can say which plan is the best."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fpdm.cli.quiet import quiet_libraries
from fpdm.drawing import Choices
from fpdm.evaluation import Evaluation, Instrument, Measure
from fpdm.experiments import sweep, tune
from fpdm.experiments.points import Point, Settings
from fpdm.sampling import Plan

Distance = Callable[[Point, int], float]
KEPT = ("scheduler", "iterations", "allocation", "reuse", "solver", "seed")
instrument_for, load_pipeline = sweep.instrument_for, lru_cache(sweep.load_pipeline)


@lru_cache
def instrument_of(data: str, size: int, channels: int) -> Instrument:
    return instrument_for(Settings(data, device="cpu"), size, channels)


class Bench:
    """The distance of a point is whatever `distance` says of it and of the number of its samples.

    measured  what was, in order: the name of the sweep's folder, the point, and the number of its samples
    stop_at   how many points are measured before Ctrl-C; None for all
    """

    def __init__(self) -> None:
        self.measured = list[tuple[str, Point, int]]()
        self.stop_at: int | None = None
        self.distance: Distance = lambda point, images: 10.0

    def measure_point(self, point: Point, settings: Settings, out: Path, *given: Any) -> dict[str, Any]:
        if len(self.measured) == self.stop_at:
            raise KeyboardInterrupt
        self.measured.append((out.name, point, settings.num_images))
        Image.new("L", (8, 8)).save(out / "grids" / f"{point.key}.png")
        value = self.distance(point, settings.num_images)
        measures = (Measure("FD-fake", value, value - 1, value + 1, 0.5, "floor"),)
        evaluation = Evaluation(settings.num_images, 50, (50, 50), 0.1, {}, {}, measures)
        choices, plan = {name: getattr(point.choices, name) for name in KEPT}, plan_of(point)
        return {**choices, "model": point.label, "budget": point.budget, "plan": str(plan), "passes": plan.planned,
                "operations": point.operations, "seconds": 0.0, "diverged": 0, "made_with": {"device": "cpu"},
                "evaluation": evaluation.to_dict()}  # fmt: skip

    def of(self, part: str) -> list[Point]:
        """The points of a sweep, by its folder's name."""
        return [point for name, point, _ in self.measured if name == part]

    def round(self, number: int) -> list[tuple[Choices, Plan]]:
        """What was measured in a round of tuning."""
        return [(point.choices, plan_of(point)) for point in self.of(f"round-{number}")]

    def images(self, part: str) -> set[int]:
        return {images for name, _, images in self.measured if name == part}


def plan_of(point: Point) -> Plan:
    return point.choices.plan(load_pipeline(point.folder, "cpu", "float32"))


def make_bench(patch: pytest.MonkeyPatch) -> Bench:
    """A bench in the place of drawing and measuring. What is slow and the same for all tests is made once."""
    bench = Bench()
    patch.setattr(sweep, "measure_point", bench.measure_point)
    patch.setattr(sweep, "load_pipeline", load_pipeline)
    for module in (sweep, tune):
        patch.setattr(module, "instrument_for", lambda settings, *shape: instrument_of(settings.data, *shape))
    quiet_libraries()
    return bench


def preferring(**wanted: Any) -> Distance:
    """Distances that are smallest where all of these choices are made."""
    return lambda point, images: 10.0 - sum(getattr(point.choices, name) == value for name, value in wanted.items())
