"""A table that was computed elsewhere: what it has is not computed again, and joins what is computed here."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fpdm.drawing import Choices
from fpdm.experiments.table import Ground, Table

Row = dict[str, Any]
PLAN = ("iterations", "allocation", "reuse", "solver", "scheduler")


def check_kept(kept: Row, name: str, table: Table, ground: Ground, steps: dict[str, int]) -> None:
    """Raises ValueError for the result of another table, or of one whose models, ways, ground or steps are others now.
    That it has fewer is allowed."""
    titles = {label: model.title for label, model in table.models.items()}
    wanted = {"table": name, "equal": table.equal}
    others = [what for what, value in wanted.items() if kept.get(what) != value]
    if measured_on(kept.get("ground", {})) != measured_on(asdict(ground)):
        others.append("ground")
    if not kept.get("models", {}).items() <= titles.items():
        others.append("models")
    if any(point["budget"] not in budgets_of(table, point["way"]) for point in kept.get("points", [])):
        others.append("ways")
    if others:
        raise ValueError(
            f"the kept result has another {' and '.join(others)} than {name}: name one that this command wrote"
        )
    for training in kept["trainings"]:
        label, made = training["model"], training["steps"]
        if made != steps[label]:
            raise ValueError(f"the kept result has {label} trained for {made} steps, and here it is {steps[label]}")


def measured_on(ground: Row) -> Row:
    """What a ground says of a measurement. Which fields of the recipe it changes is left out: recipes change, too, and
    trainings that were the recipe's then are now named in full."""
    named = ("recipe", "split", "seeds", "chosen_on", "reported_on")
    return json.loads(json.dumps({name: ground.get(name) for name in named}))  # type: ignore[no-any-return]


def budgets_of(table: Table, way: str) -> Sequence[int]:
    return table.ways[way].budgets if way in table.ways else ()


def measured(kept: Row | None) -> dict[tuple[str, int], set[tuple[str, int]]]:
    """(label, seed) of a kept table's trainings -> (way, budget) of the points that it has of them."""
    there: dict[tuple[str, int], set[tuple[str, int]]] = {}
    for point in points_of(kept):
        there.setdefault((point["model"], point["seed"]), set()).add((point["way"], point["budget"]))
    return there


def chosen(kept: Row | None, label: str, seed: int) -> list[Row]:
    """The plans that were chosen by a training, as an experiment keeps them in OUT/chosen."""
    points = [p for p in points_of(kept) if (p["model"], p["seed"]) == (label, seed)]
    rows = []
    for point in points:
        among = [{"choices": whole(point, other), "value": other["value"]} for other in point["among"]]
        best = min(among, key=lambda row: row["value"], default=None)
        rows.append({
            "way": point["way"],
            "budget": point["budget"],
            "choices": best["choices"] if best else whole(point, {name: point[name] for name in PLAN}),
            "value": best and best["value"],
            "among": among,
            "best": point["best"],
        })  # fmt: skip
    return rows


def compact(result: Row) -> Row:
    """A table whose points name what they were made with by its place in a list, as there are many of few kinds."""
    kinds = list[Row]()
    for point in result["points"]:
        if point["made_with"] not in kinds:
            kinds.append(point["made_with"])
    points = [{**point, "made_with": kinds.index(point["made_with"])} for point in result["points"]]
    return {**result, "points": points, "made_with": kinds}


def expanded(result: Row) -> Row:
    """The table that `compact` made this one of."""
    kinds = result["made_with"]
    return {**result, "points": [{**point, "made_with": kinds[point["made_with"]]} for point in result["points"]]}


def points_of(kept: Row | None) -> list[Row]:
    return [] if kept is None else kept["points"]


def whole(point: Row, unusual: Row) -> Row:
    """Choices of which a table keeps what is not the default."""
    named = {name: value for name, value in unusual.items() if name != "value"}
    return {**Choices().to_dict(), "budget": point["budget"], **named}
