"""A table that was computed elsewhere: what it has is not computed again, and joins what is computed here."""

import json
from dataclasses import asdict
from typing import Any

from fpdm.drawing import Choices
from fpdm.experiments.table import Ground, Table

Row = dict[str, Any]
PLAN = ("iterations", "allocation", "reuse", "solver", "scheduler")


def check_kept(kept: Row, name: str, table: Table, ground: Ground, steps: dict[str, int]) -> None:
    """Raises ValueError for the result of another table, or of one whose models, ground or steps are others now."""
    on = json.loads(json.dumps({**asdict(ground), "data": None}))
    titles = {label: model.title for label, model in table.models.items()}
    wanted = {"table": name, "equal": table.equal, "ground": on, "models": titles}
    if others := [what for what, value in wanted.items() if kept.get(what) != value]:
        raise ValueError(
            f"the kept result has another {' and '.join(others)} than {name}: name one that this command wrote"
        )
    for training in kept["trainings"]:
        label, made = training["model"], training["steps"]
        if made != steps[label]:
            raise ValueError(f"the kept result has {label} trained for {made} steps, and here it is {steps[label]}")


def measured(kept: Row | None) -> set[tuple[str, int]]:
    """Labels and seeds of the trainings that a kept table has points of."""
    return {(point["model"], point["seed"]) for point in (kept or {"points": []})["points"]}


def chosen(kept: Row | None, label: str, seed: int) -> list[Row]:
    """The plans that were chosen by a training, as an experiment keeps them in OUT/chosen."""
    points = [p for p in (kept or {"points": []})["points"] if (p["model"], p["seed"]) == (label, seed)]
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


def whole(point: Row, unusual: Row) -> Row:
    """Choices of which a table keeps what is not the default."""
    named = {name: value for name, value in unusual.items() if name != "value"}
    return {**Choices().to_dict(), "budget": point["budget"], **named}
