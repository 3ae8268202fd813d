"""What a table or a plot of an experiment's result.json has: its lines, and the distances in them."""

from collections.abc import Iterable, Iterator
from typing import Any

Row = dict[str, Any]
Line = tuple[str, str, dict[int, list[float]]]  # label, name, distances by budget


def reached(result: Row, name: str) -> list[Any]:
    """Of the table's "ways" or "budgets" those that anything has been measured of, so far; all, as long as none has."""
    there = {point[name.removesuffix("s")] for point in result["points"]}
    return [value for value in result[name] if value in there] or list(result[name])


def compared(result: Row) -> list[str]:
    """The ways that are shown each for itself: those of several models, unless each way has budgets of its own."""
    places = {(point["way"], point["budget"]) for point in result["points"]}
    several = len(result["models"]) > 1 and len(places) > len({budget for _, budget in places})
    return reached(result, "ways") if several else []


def lines_of(result: Row, way: str | None) -> Iterator[Line]:
    """Label, name and distances by budget of each line of a table: one per model, or one per way."""
    models = {row["model"] for row in result["points"]}
    if way is None and len(result["models"]) == 1:
        for name in reached(result, "ways"):
            yield name, name, values_of(p for p in result["points"] if p["way"] == name)
        return
    for label, title in result["models"].items():
        if label not in models:
            continue
        parameters = next(t["parameters"] for t in result["trainings"] if t["model"] == label)
        own = [p for p in result["points"] if p["model"] == label and way in (None, p["way"])]
        yield label, f"{title} ({parameters / 1e6:.2f} M)", values_of(own)


def values_of(points: Iterable[Row]) -> dict[int, list[float]]:
    """Budget -> a distance per training."""
    return {budget: [distance(point) for point in own] for budget, own in shown(points).items()}


def shown(points: Iterable[Row]) -> dict[int, list[Row]]:
    """Budget -> the points of one of the ways: that which most trainings have, and of those that as many have the one
    that was best when plans were chosen."""
    found: dict[int, dict[str, list[Row]]] = {}
    for point in points:
        found.setdefault(point["budget"], {}).setdefault(point["way"], []).append(point)
    return {budget: max(ways.values(), key=precedence) for budget, ways in found.items()}


def precedence(points: list[Row]) -> tuple[int, bool]:
    return len(points), any(point["best"] for point in points)


def distance(point: Row) -> float:
    return float(next(iter(point["measures"].values()))[0])
