"""Tuned plans: kept beside a model, found by budget, turned into a call."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpdm.sampling import Cost, TunedPlan, add_plans, load_plans, nearest_plan, plan_for

SMALL = TunedPlan(
    40, (3, 2, 4, 3), "heun", "linear", "anderson:2", {"data": "digits", "images": 1000, "fd": [1.5, 1.7]}
)
LARGE = TunedPlan(160, (2,) * 40, "unipc", "plain", "picard", {})
EXPLICIT = TunedPlan(84, (None,) * 3, "dpm++", "plain", "picard", {})


def test_plans_survive_a_folder_in_the_order_of_their_budgets(tmp_path):
    assert load_plans(tmp_path) == ()
    add_plans(tmp_path, [LARGE, SMALL])
    assert load_plans(tmp_path) == (SMALL, LARGE)
    add_plans(tmp_path, [EXPLICIT])
    assert load_plans(tmp_path) == (SMALL, EXPLICIT, LARGE)


def test_a_plan_takes_the_place_of_the_one_of_its_budget(tmp_path):
    add_plans(tmp_path, [SMALL, LARGE])
    better = dataclasses.replace(LARGE, scheduler="ddim")
    add_plans(tmp_path, [better])
    assert load_plans(tmp_path) == (SMALL, better)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ('[{"budget": 40', "is damaged"),
        ("[1, 2]", "does not hold plans"),
        ("null", "does not hold plans"),
        ('[{"budget": 40}]', "does not hold plans"),
        ('[{"plans": []}]', "does not hold plans"),
        (json.dumps([dataclasses.asdict(SMALL) | {"extra": 1}]), "does not hold plans"),
        (json.dumps([dataclasses.asdict(SMALL) | {"iterations": None}]), "does not hold plans"),
    ],
)
def test_a_damaged_file_is_told_by_name_and_not_written_over(text, message, tmp_path):
    path = tmp_path / "plans.json"
    path.write_text(text)
    for attempt in (lambda: load_plans(tmp_path), lambda: add_plans(tmp_path, [SMALL])):
        with pytest.raises(ValueError, match=message) as refusal:
            attempt()
        assert str(path) in str(refusal.value)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("budget", "nearest"), [(1, 40), (40, 40), (79, 40), (80, 40), (81, 160), (160, 160), (10**6, 160)]
)
def test_the_nearest_plan_is_so_by_ratio_and_the_smaller_of_two(budget, nearest):
    assert nearest_plan([LARGE, SMALL], budget).budget == nearest
    assert nearest_plan([SMALL, LARGE], budget).budget == nearest
    assert nearest_plan([], budget) is None


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 1000))
def test_a_plan_of_the_very_budget_is_always_found(budgets, budget):
    plans = [dataclasses.replace(SMALL, budget=b) for b in (*budgets, budget)]
    assert nearest_plan(plans, budget).budget == budget


def test_the_nearest_plan_to_no_budget_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        nearest_plan([SMALL], 0)


def test_the_choices_of_a_plan_are_those_of_a_call():
    common, cost = {"scheduler": "heun", "reuse": "linear", "solver": "anderson:2"}, Cost(2, 1)
    assert SMALL.choices(40, cost) == common | {"iterations": [3, 2, 4, 3]}  # which leave more than a budget may
    whole = dataclasses.replace(SMALL, budget=20)
    assert whole.choices(20, cost) == common | {"iterations": [3, 2, 4, 3], "budget": 20}
    assert SMALL.choices(80, cost) == common | {"iterations": 3, "budget": 80}
    assert SMALL.choices(4, cost) == common | {"iterations": 2, "budget": 4}  # as many as fit one timestep
    assert SMALL.choices(7, cost, range(2, 99, 2)) == common | {"iterations": 1, "budget": 7}  # or the fewest there are
    explicit = {"scheduler": "dpm++", "reuse": "plain", "solver": "picard"}
    assert EXPLICIT.choices(84, Cost(28, 0)) == explicit | {"num_inference_steps": 3, "budget": 84}
    assert EXPLICIT.choices(28, Cost(28, 0)) == explicit | {"budget": 28}


@pytest.mark.parametrize(
    ("call", "followed"),
    [
        ({"budget": 50}, SMALL),
        ({"budget": 150, "class_labels": [1], "seed": 3, "iterations": None, "pooled": False}, LARGE),
        ({"budget": 150, "iterations": 2}, None),
        ({"budget": 150, "reuse": False}, None),
        ({"budget": 150, "pooled": True}, None),
        ({"budget": 150, "guidance_scale": 2.0}, None),
        ({"budget": None}, None),
        ({}, None),
    ],
    ids=str,
)
def test_a_call_that_says_no_more_of_its_plan_than_a_budget_follows_the_nearest(call, followed):
    assert plan_for([SMALL, LARGE], call) == followed
    assert plan_for([], call) is None


@pytest.mark.parametrize("budget", [0, -3, 1.5, "40"])
def test_a_call_of_a_budget_that_cannot_be_is_refused(budget):
    with pytest.raises(ValueError, match=r"budget is .*; it must be an integer of at least 1"):
        plan_for([SMALL], {"budget": budget})
