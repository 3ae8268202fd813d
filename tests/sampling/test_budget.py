"""Budgets become integers: what holds for every plan, the cases of the paper, and what is refused."""

import re
from fractions import Fraction

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fpdm.sampling import ALLOCATIONS, DEFAULT_BUDGET, Cost, apportion, make_plan

FPDM_XL, DIT_XL = Cost(fixed=2, per_iteration=1), Cost(fixed=28, per_iteration=0)
LOOPED = Cost(fixed=0, per_iteration=3)  # all blocks are shared

costs = st.builds(Cost, fixed=st.integers(0, 9), per_iteration=st.integers(1, 4))
steps = st.integers(1, 80)
spare = st.integers(0, 400)
weights = st.lists(st.fractions(Fraction(1, 100), 100), min_size=1, max_size=20)


@given(costs, steps, spare, st.sampled_from(ALLOCATIONS))
def test_a_possible_budget_is_spent_to_the_last_whole_iteration(cost, num_steps, spare, allocation):
    budget = num_steps * cost.passes(1) + spare
    plan = make_plan(cost, budget=budget, num_steps=num_steps, allocation=allocation)
    assert plan.num_steps == len(plan.iterations) == num_steps
    assert min(plan.iterations) >= 1
    assert plan.passes == tuple(cost.fixed + cost.per_iteration * n for n in plan.iterations)
    assert 0 <= budget - plan.planned < cost.per_iteration  # with K = 1: nothing is left
    assert plan.asked == budget


@given(costs, st.integers(1, 3000), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 30)))
def test_a_budget_alone_finds_its_timesteps(cost, budget, max_steps, iterations):
    budget += cost.passes(iterations or 1)
    plan = make_plan(cost, budget=budget, iterations=iterations, calls=range(1, max_steps + 1))
    assert 1 <= plan.num_steps <= max_steps
    assert 0 <= budget - plan.planned < cost.per_iteration
    if plan.num_steps < max_steps and iterations and budget >= cost.passes(iterations):
        assert plan.num_steps == budget // cost.passes(iterations)


@given(costs, steps, spare)
def test_a_rising_plan_never_falls_and_a_falling_one_never_rises(cost, num_steps, spare):
    choices = {"budget": num_steps * cost.passes(1) + spare, "num_steps": num_steps}
    rising = make_plan(cost, allocation="rising", **choices).iterations
    falling = make_plan(cost, allocation="falling", **choices).iterations
    assert list(rising) == sorted(rising)
    assert list(falling) == sorted(falling, reverse=True)


@given(num_steps=steps, spare=spare)
@example(num_steps=2, spare=4)  # quotas 1.5 and 4.5
def test_rising_and_falling_are_mirror_images(num_steps, spare):
    choices = {"budget": num_steps * FPDM_XL.passes(1) + spare, "num_steps": num_steps}
    rising, falling = (make_plan(FPDM_XL, allocation=name, **choices).iterations for name in ("rising", "falling"))
    assert rising == falling[::-1]


@given(costs, steps, spare)
def test_constant_counts_differ_by_at_most_one(cost, num_steps, spare):
    plan = make_plan(cost, budget=num_steps * cost.passes(1) + spare, num_steps=num_steps)
    assert max(plan.iterations) - min(plan.iterations) <= 1


slopes = st.fractions(-2, 2, max_denominator=50).filter(lambda slope: abs(slope) < 2)
shapes = st.sampled_from(["linear", "cosine"])


@given(costs, steps, spare, shapes, slopes)
def test_a_ramp_of_any_slope_spends_the_budget_and_never_turns(cost, num_steps, spare, shape, slope):
    budget = num_steps * cost.passes(1) + spare
    plan = make_plan(cost, budget=budget, num_steps=num_steps, allocation=f"{shape}:{float(slope)}")
    assert 0 <= budget - plan.planned < cost.per_iteration
    assert plan.planned == sum(cost.passes(n) for n in plan.iterations)
    assert min(plan.iterations) >= 1
    if slope:  # in sampling order: a positive slope gives the most to the last timesteps, which make the details
        assert list(plan.iterations) == sorted(plan.iterations, reverse=slope < 0)
    else:
        assert plan.iterations == make_plan(cost, budget=budget, num_steps=num_steps).iterations


def ramps(num_steps, spare, shape, slope):
    choices = {"budget": num_steps * FPDM_XL.passes(1) + spare, "num_steps": num_steps}
    return [make_plan(FPDM_XL, allocation=f"{shape}:{s}", **choices).iterations for s in (slope, -slope)]


@given(steps, spare, slopes)
def test_a_falling_line_mirrors_the_rising_one_of_the_same_slope(num_steps, spare, slope):
    assume(slope != 0)  # what is left over of equal shares is spread, not mirrored
    rising, falling = ramps(num_steps, spare, "linear", slope)
    assert rising == falling[::-1]


@given(steps, spare, slopes)
def test_a_falling_cosine_mirrors_the_rising_one_to_within_one_iteration(num_steps, spare, slope):
    assume(slope != 0)
    rising, falling = ramps(num_steps, spare, "cosine", slope)
    assert all(abs(a - b) <= 1 for a, b in zip(rising, falling[::-1], strict=True))


def test_a_falling_cosine_mirrors_the_rising_one():
    rising, falling = ramps(3, 42, "cosine", 1)  # weights 1/2, 1, 3/2 of 45: quotas 7.5, 15, 22.5
    assert rising == falling[::-1]


def test_ramps_by_hand():
    def shared(allocation, total, num_steps=5):
        return make_plan(FPDM_XL, budget=2 * num_steps + total, num_steps=num_steps, allocation=allocation).iterations

    assert shared("linear:1", 60) == shared("rising", 60) == shared("linear", 60) == (6, 9, 12, 15, 18)
    assert shared("linear:-1", 60) == shared("falling", 60) == (18, 15, 12, 9, 6)
    assert shared("linear:0.5", 40) == (6, 7, 8, 9, 10)
    assert shared("linear:1/2", 40) == shared("linear:0.5", 40)
    # (1 - cos(pi i / 4)) / 2 = 0, 0.146, 0.5, 0.854, 1: flat at both ends
    assert shared("cosine:1", 1000) == shared("cosine", 1000) == (100, 129, 200, 271, 300)
    assert shared("cosine:-1", 1000) == (300, 271, 200, 129, 100)
    assert shared("linear:1.9", 7, 1) == shared("cosine:-1.9", 7, 1) == (7,)
    assert shared("linear:0", 17) == shared("cosine:0", 17) == shared("constant", 17)


@pytest.mark.parametrize(
    ("allocation", "text"),
    [
        ("linear:2", "between -2 and 2"),
        ("linear:-2", "between -2 and 2"),
        ("cosine:2.0001", "between -2 and 2"),
        ("linear:", "between -2 and 2"),
        ("linear:steep", "between -2 and 2"),
        ("linear:nan", "between -2 and 2"),
        ("cosine:inf", "between -2 and 2"),
        ("linear:1:1", "between -2 and 2"),
        ("liner:1", "Did you mean 'linear"),
        ("rising:1", "unknown allocation 'rising:1'"),
        ("constant:1", "unknown allocation 'constant:1'"),
        ("", "unknown allocation ''"),
        pytest.param("linear:1/0", "between -2 and 2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("choices", [{"budget": 30, "num_steps": 3}, {"num_steps": 1}])
def test_a_ramp_that_cannot_be_is_refused_by_name(allocation, text, choices):
    with pytest.raises(ValueError, match=re.escape(text)):
        make_plan(FPDM_XL, allocation=allocation, **choices)


@given(costs, st.integers(0, 3000), st.one_of(st.none(), st.integers(1, 30)))
def test_heun_finds_an_odd_number_of_timesteps_for_a_budget(cost, spare, iterations):
    budget = cost.passes(iterations or 1) + spare
    plan = make_plan(cost, budget=budget, iterations=iterations, calls=range(1, 1000, 2))
    free = make_plan(cost, budget=budget, iterations=iterations)
    assert plan.num_steps == free.num_steps - (free.num_steps % 2 == 0)
    assert 0 <= budget - plan.planned < cost.per_iteration  # the timestep left out is spent on the others


@given(st.integers(1, 40), st.integers(1, 3000), st.integers(1, 200))
def test_heun_on_an_explicit_network_has_an_odd_number_of_timesteps(depth, budget, max_steps):
    cost, choices = Cost(depth, 0), {"calls": range(1, 2 * max_steps, 2)}
    assume(budget >= depth)
    plan = make_plan(cost, budget=budget, **choices)
    assert plan.num_steps % 2 == 1
    assert plan.planned <= budget
    fits = min(budget // depth, 2 * max_steps - 1)
    assert plan.num_steps in (fits, fits - 1)
    # The same number named beside the budget is no contradiction, two fewer would be.
    assert make_plan(cost, budget=budget, num_steps=plan.num_steps, **choices) == plan
    if plan.num_steps > 2:
        with pytest.raises(ValueError, match="leave one out"):
            make_plan(cost, budget=budget, num_steps=plan.num_steps - 2, **choices)


def test_heun_on_an_explicit_network_refuses_a_budget_below_one_timestep():
    with pytest.raises(ValueError, match="smallest possible is 28"):
        make_plan(DIT_XL, budget=27, calls=range(1, 1000, 2))


def test_rising_weights_go_from_a_half_to_one_and_a_half():
    plan = make_plan(FPDM_XL, budget=5 * (2 + 12), num_steps=5, allocation="rising")
    assert plan.iterations == (6, 9, 12, 15, 18)


@given(weights, st.integers(0, 500))
def test_shares_are_whole_ordered_and_add_up(weights, spare):
    total = len(weights) + spare
    shares = apportion(total, weights)
    assert sum(shares) == total
    assert min(shares) >= 1
    unequal = len(set(weights)) > 1  # equal weights are spread evenly instead
    for mine, share in zip(weights, shares, strict=True):
        heavier = [s for w, s in zip(weights, shares, strict=True) if w > mine]
        assert not unequal or all(s >= share for s in heavier)


@given(weights, st.integers(0, 2000))
def test_shares_are_proportional_to_within_one(weights, spare):
    # Enough in all that the smallest quota is 1: no share has to be raised.
    total = int(sum(weights) / min(weights)) + 1 + spare
    for share, weight in zip(apportion(total, weights), weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1


def test_a_share_below_one_is_raised_and_the_rest_stays_proportional():
    assert apportion(13, [Fraction(1), Fraction(1), Fraction(100), Fraction(200)]) == (1, 1, 4, 7)


@given(costs, steps, st.data())
def test_too_small_a_budget_is_refused_by_naming_the_smallest_that_works(cost, num_steps, data):
    assume(num_steps * cost.passes(1) > 1)
    budget = data.draw(st.integers(1, num_steps * cost.passes(1) - 1))
    with pytest.raises(ValueError, match="too small") as refusal:
        make_plan(cost, budget=budget, num_steps=num_steps)
    smallest = int(re.search(r"need at least (\d+)", str(refusal.value))[1])
    assert make_plan(cost, budget=smallest, num_steps=num_steps).iterations == (1,) * num_steps
    with pytest.raises(ValueError, match="too small"):
        make_plan(cost, budget=smallest - 1, num_steps=num_steps)


@pytest.mark.parametrize(("num_steps", "iterations"), [(20, 26), (40, 12), (80, 5), (112, 3)])
def test_smoothing_the_cost_of_twenty_dit_steps(num_steps, iterations):
    assert make_plan(DIT_XL, num_steps=20).planned == 560
    plan = make_plan(FPDM_XL, budget=560, num_steps=num_steps)
    assert plan.iterations == (iterations,) * num_steps
    assert plan.planned == 560


@pytest.mark.parametrize(
    ("choices", "iterations"),
    [
        ({}, (2,) * (DEFAULT_BUDGET // 4)),
        ({"num_steps": 3}, (2, 2, 2)),
        ({"num_steps": 3, "iterations": 5}, (5, 5, 5)),
        ({"iterations": [3, 1, 2]}, (3, 1, 2)),
        ({"iterations": (3, 1, 2), "num_steps": 3, "budget": 12}, (3, 1, 2)),
        ({"num_steps": 3, "iterations": 5, "budget": 21}, (5, 5, 5)),
        ({"budget": 23, "num_steps": 3, "allocation": [1, 2, 4]}, (2, 5, 10)),
        ({"budget": 14, "calls": range(1, 3)}, (5, 5)),
    ],
)
def test_choices_that_agree(choices, iterations):
    plan = make_plan(FPDM_XL, **choices)
    assert plan.iterations == iterations
    assert plan.planned == sum(2 + n for n in iterations)
    assert plan.asked == choices.get("budget", None if choices else DEFAULT_BUDGET)


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ({"num_steps": 4, "iterations": 5, "budget": 30}, "cost 28 block passes, not 30"),
        ({"num_steps": 3, "iterations": [1, 2]}, "2 iteration counts for 3 timesteps"),
        ({"budget": 9, "iterations": [1, 2]}, "cost 7 block passes, not 9"),
        ({"iterations": []}, "empty list"),
        ({"iterations": [1, 0]}, "at least 1"),
        ({"iterations": [1, 2.0]}, "an integer"),
        ({"iterations": 0}, "at least 1"),
        ({"budget": 0}, "budget is 0"),
        ({"budget": 2.5}, "budget is 2.5"),
        ({"num_steps": -1}, "the number of timesteps is -1"),
        ({"num_steps": 11, "calls": range(1, 11)}, "room for 1 to 10"),
        ({"iterations": [1] * 11, "calls": range(1, 11)}, "room for 1 to 10"),
        ({"budget": 99, "num_steps": 11, "calls": range(1, 11)}, "room for 1 to 10"),
        ({"budget": 30, "num_steps": 3, "allocation": [1, 2]}, "2 weights for 3 timesteps"),
        ({"budget": 30, "num_steps": 3, "allocation": "raising"}, "Did you mean 'rising'"),
    ],
)
def test_choices_that_do_not(choices, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make_plan(FPDM_XL, **choices)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_must_be_positive_and_finite(bad):
    with pytest.raises(ValueError, match="positive and finite"):
        make_plan(FPDM_XL, budget=30, num_steps=3, allocation=[1.0, bad, 1.0])


@pytest.mark.parametrize("choices", [{"num_steps": 3}, {"num_steps": 3, "iterations": 5}, {"iterations": [1, 2, 3]}])
def test_an_unknown_allocation_is_refused_without_a_budget_too(choices):
    with pytest.raises(ValueError, match="Did you mean 'rising'"):
        make_plan(FPDM_XL, allocation="raising", **choices)


@given(st.integers(1, 40), st.integers(1, 5000))
def test_an_explicit_network_has_budget_over_depth_timesteps(depth, budget):
    if budget < depth:
        with pytest.raises(ValueError, match=f"smallest possible is {depth}"):
            make_plan(Cost(depth, 0), budget=budget)
    else:
        plan = make_plan(Cost(depth, 0), budget=budget, calls=range(1, 5001))
        assert plan.num_steps == budget // depth
        assert plan.iterations == (None,) * plan.num_steps
        assert plan.planned == plan.num_steps * depth


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ({"iterations": 2}, "no iterations"),
        ({"iterations": [2, 2]}, "no iterations"),
        ({"budget": 100, "num_steps": 4}, "smallest possible is 112"),
        ({"budget": 112, "allocation": "linear:0.5"}, "leaves nothing to share out"),
        ({"budget": 112, "allocation": "linear:3"}, "between -2 and 2"),
        ({"num_steps": 1001}, "room for 1 to 1000"),
    ],
)
def test_what_an_explicit_network_refuses(choices, text):
    with pytest.raises(ValueError, match=text):
        make_plan(DIT_XL, **choices)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (make_plan(FPDM_XL, budget=560, num_steps=40), "40 timesteps x 12 iterations, 560 block passes"),
        (make_plan(FPDM_XL, iterations=[1, 3]), "2 timesteps x 1 to 3 iterations, 8 block passes"),
        (make_plan(DIT_XL, num_steps=20), "20 timesteps, 560 block passes"),
        (make_plan(FPDM_XL), "40 timesteps x 2 iterations, 160 block passes"),
        (make_plan(LOOPED), "53 timesteps x 1 iteration, 159 block passes"),
        (make_plan(LOOPED, num_steps=4), "4 timesteps x 1 iteration, 12 block passes"),
        (make_plan(LOOPED, budget=24, num_steps=4), "4 timesteps x 2 iterations, 24 block passes"),
        (make_plan(LOOPED, budget=24, iterations=4), "2 timesteps x 4 iterations, 24 block passes"),
    ],
)
def test_a_plan_says_what_it_spends(plan, text):
    assert str(plan) == text
