"""scripts/write_tables.py: the cells of its tables, from small results made up by hand."""

import importlib.util
import json
from pathlib import Path

import pytest

from fpdm.evaluation import Evaluation, Measure

SCRIPT = Path(__file__).parents[1] / "scripts/write_tables.py"
POINT = {"scheduler": "dpm++", "solver": "picard", "tuned": False, "iterations": 2, "reuse": "plain", "seed": 0}


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("write_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_points(folder, points):
    (folder / "points").mkdir()
    for i, (budget, value, changes) in enumerate(points):
        measures = (Measure("FD-fake", value, value - 1, value + 1, 0.5, "floor", 0.125),)
        evaluation = Evaluation(50, 50, (50, 50), 0.5, {}, {}, measures).to_dict()
        of_plan = {"model": "fpdm", "budget": budget, "passes": budget - 1, "plan": f"9 x 2, {budget - 1} block passes"}
        point = {**POINT, **of_plan, "parameters": 2_500_000, **changes, "evaluation": evaluation}
        (folder / "points" / f"{i}.json").write_text(json.dumps(point))
    return str(folder)


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def written(path, value):
    path.write_text(json.dumps(value))
    return str(path)


def test_a_ladder_has_means_over_seeds_with_the_smallest_and_largest(tables, tmp_path):
    folder = save_points(
        tmp_path,
        [
            (80, 3.0, {}),
            (80, 5.0, {"seed": 1}),
            (40, 9.5, {}),
            (40, 7.25, {"reuse": "linear"}),
            (80, 6.0, {"iterations": 6, "reuse": "none"}),
            (80, 1.5, {"tuned": True, "iterations": None, "scheduler": "ddim", "solver": "anderson:2"}),
            (80, 100.0, {"scheduler": "ddim"}),  # these are on no rung
            (80, 100.0, {"solver": "broyden"}),
        ],
    )
    head, rule, *rows, real = cells(tables.ladder(folder))
    assert head == ["", "40", "80"]
    assert rule == ["---"] * 3
    found = {name: rest for name, *rest in rows}
    assert list(found) == list(tables.LADDER)
    assert found.pop("+ reuse") == ["9.5 (9.5 to 9.5)", "4 (3 to 5)"]
    assert found.pop("+ linear forecast") == ["7.25 (7.25 to 7.25)", ""]
    assert found.pop("no smoothing: 6 iterations") == ["", "6 (6 to 6)"]
    assert found.pop("tuned") == ["", "1.5 (1.5 to 1.5)"]
    assert all(rest == ["", ""] for rest in found.values())
    assert real == ["real images", "0.5 ± 0.125", "0.5 ± 0.125"]


def test_metrics_and_models_have_a_row_per_budget_and_per_model(tables, tmp_path):
    folder = save_points(tmp_path, [(80, 3.0, {}), (40, 9.5, {}), (80, 2.0, {"model": "dit", "parameters": 500_000})])
    assert cells(tables.metrics(folder, "fpdm", "dpm++"))[2:] == [
        ["39", "9 x 2", "9.5 (8.5 to 10.5)"],
        ["79", "9 x 2", "3 (2 to 4)"],
        ["real images", "", "0.5 ± 0.125"],
    ]
    assert cells(tables.models(folder, "dpm++"))[2:] == [
        ["dit", "0.50 M", "", "2 (1 to 3)"],
        ["fpdm", "2.50 M", "9.5 (8.5 to 10.5)", "3 (2 to 4)"],
    ]


def test_tuned_plans_have_a_row_each(tables, tmp_path):
    found = {"by_hand": 4.0, "value": 3.25, "plan_by_hand": "10 timesteps x 2 iterations, 40 block passes"}
    common = {"scheduler": "unipc", "reuse": "linear", "solver": "picard", "found": found}
    plans = [{"budget": 40, "iterations": [3, 2, 2, 1], **common}, {"budget": 80, "iterations": [2] * 20, **common}]
    written(tmp_path / "plans.json", plans)
    head, _, first, second = cells(tables.tuned(str(tmp_path)))
    assert len(head) == len(first)
    assert first == ["40", "4", "3, 2, ... 1", "unipc", "linear", "picard", "4", "3.25", found["plan_by_hand"]]
    assert second[:3] == ["80", "20", "2"]


def test_solvers_are_relative_to_plain_iteration(tables, tmp_path):
    errors = {"picard": {1: 0.5, 4: 0.02}, "anderson:2": {1: 0.5, 4: 0.005}}
    means = [
        {"solver": name, "iterations": n, "error": error}
        for name, row in errors.items()
        for n, error in row.items()
    ]  # fmt: skip
    path = written(tmp_path / "solvers.json", {"means": means, "seconds": {"picard": 1.0, "anderson:2": 1.234}})
    assert cells(tables.solvers(path, "1", "4")) == [
        ["solver", "time", "n = 1", "n = 4"],
        ["---"] * 4,
        ["picard", "1.00", "1.00", "1.00"],
        ["anderson:2", "1.23", "1.00", "0.25"],
        ["picard's error", "", "5.0e-01", "2.0e-02"],
    ]


def test_stopping_compares_seconds_with_sums_of_iterations(tables, tmp_path):
    row = {"finished early": 8, "of": 32, "ratio of seconds": 0.789, "quartiles": [0.75, 0.8], "ratio of sums": 0.775}
    path = written(tmp_path / "stopping.json", {"parts": {"stopping": {"rows": [row]}}})
    assert cells(tables.stopping(path))[2:] == [["8 of 32", "0.78", "0.79 (0.75 to 0.80)"]]


def test_tables_take_the_place_of_what_stood_between_the_marks(tables, tmp_path):
    path = written(tmp_path / "stopping.json", {"parts": {"stopping": {"rows": []}}})
    text = f"before\n<!-- table stopping {path} -->\nold\nlines\n<!-- end -->\nafter\n"
    found = tables.rendered(text)
    assert found.splitlines()[2:4] == tables.stopping(path).splitlines()
    assert found.startswith("before\n<!-- table stopping")
    assert found.endswith("<!-- end -->\nafter\n")
    assert "old" not in found
    assert tables.rendered(found) == found
