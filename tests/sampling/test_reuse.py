"""What one solve tells of the next: polynomials in the angle of the noise level, for any number of rows."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpdm.diffusion import make_schedule
from fpdm.sampling import REUSE, SCHEDULERS, Guidance, check_reuse, cost_of, make_plan
from fpdm.sampling.reuse import Carry, angle, lagrange
from tests.sampling.tiny import CALM, contracting, run

LEVELS = (0.01, 0.2, 0.5, 0.8, 0.99)  # alpha_bar in sampling order

times = st.lists(st.integers(0, 30), min_size=1, max_size=3, unique=True).map(lambda n: [0.05 * i for i in n])


def trajectory(degree, rows=2):
    """Solutions (rows, 2, 3) at `LEVELS`, a polynomial of the angle, other coefficients for every element."""
    coefficients = torch.randn(degree + 1, rows, 2, 3, generator=torch.Generator().manual_seed(degree))
    return [sum(c * angle(level) ** power for power, c in enumerate(coefficients)) for level in LEVELS]


@given(times, st.floats(0, 1.5))
def test_the_weights_sum_to_one(times, time):
    weights = lagrange(times, time)
    assert len(weights) == len(times)
    assert sum(weights) == pytest.approx(1, abs=1e-6 * sum(map(abs, weights)))


@given(times, st.floats(0, 1.5), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_the_weights_are_exact_for_polynomials_of_their_degree(times, time, coefficients):
    def value(at):
        return sum(c * at**power for power, c in enumerate(coefficients[: len(times)]))

    weights = lagrange(times, time)
    foretold = sum(weight * value(at) for weight, at in zip(weights, times, strict=True))
    assert foretold == pytest.approx(value(time), abs=1e-6 * (1 + sum(map(abs, weights))))


def test_the_weight_at_a_known_time_is_all_on_it():
    assert lagrange([0.2, 0.5, 0.9], 0.5) == [0, 1, 0]


@pytest.mark.parametrize("kind", REUSE)
def test_nothing_is_foretold_from_nothing(kind):
    assert Carry(kind).start(0.3, 2) is None


@pytest.mark.parametrize(("kind", "degree"), [("plain", 0), ("linear", 1), ("quadratic", 2)])
def test_a_trajectory_of_the_kinds_degree_is_foretold_exactly_and_one_above_is_not(kind, degree):
    for true_degree in (degree, degree + 1):
        carry, solutions = Carry(kind), trajectory(true_degree)
        for index, (level, solution) in enumerate(zip(LEVELS, solutions, strict=True)):
            start = carry.start(level, 2)
            if index > degree:  # as many points as it remembers
                assert torch.allclose(start, solution, atol=1e-4) == (true_degree == degree)
            carry.add(level, solution)


@pytest.mark.parametrize(("kind", "kept"), [("none", 0), ("plain", 1), ("linear", 2), ("quadratic", 3)])
def test_no_more_solutions_are_remembered_than_needed(kind, kept):
    carry = Carry(kind)
    for level, solution in zip(LEVELS, trajectory(1), strict=True):
        carry.add(level, solution)
    assert len(carry.solutions) == len(carry.times) == kept


@pytest.mark.parametrize("kind", ["plain", "linear", "quadratic"])
def test_a_second_solution_at_a_noise_level_takes_the_place_of_the_first(kind):
    # Heun calls the network twice at a timestep: two points at one time would divide by zero.
    carry, solutions = Carry(kind), trajectory(1)
    for level, solution in zip(LEVELS[:3], solutions, strict=False):
        carry.add(level, solution + 1)
        torch.testing.assert_close(carry.start(level, 2), solution + 1)
        carry.add(level, solution)
    assert len(set(carry.times)) == len(carry.times)
    assert carry.start(LEVELS[3], 2).isfinite().all()
    if kind != "plain":  # the points are the second solutions', which lie on a line
        torch.testing.assert_close(carry.start(LEVELS[3], 2), solutions[3], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "linear", "quadratic"])
def test_guidances_second_half_begins_where_the_first_was_and_the_first_goes_on_alone(kind):
    carry, solutions = Carry(kind), trajectory(0, rows=4)
    for level, solution in zip(LEVELS[:2], solutions, strict=False):
        carry.add(level, solution[:2])  # without guidance
    torch.testing.assert_close(carry.start(LEVELS[2], 4), torch.cat([solutions[2][:2]] * 2))
    carry.add(LEVELS[2], solutions[2])  # with it
    torch.testing.assert_close(carry.start(LEVELS[3], 2), solutions[3][:2])
    assert carry.start(LEVELS[3], 4).shape == (4, 2, 3)
    if kind == "plain":
        assert torch.equal(carry.start(LEVELS[3], 4), solutions[2])


@pytest.mark.parametrize(("level", "expected"), [(0.0, math.pi / 2), (1.0, 0.0), (0.5, math.pi / 4), (1 + 1e-7, 0.0)])
def test_the_angle_of_a_noise_level_is_bounded(level, expected):
    assert angle(level) == pytest.approx(expected)


def test_kinds_by_name():
    assert [check_reuse(kind) for kind in (True, False, *REUSE)] == ["plain", "none", *REUSE]
    with pytest.raises(ValueError, match="Did you mean 'quadratic'"):
        check_reuse("quadratik")


# In a sampling


@pytest.mark.parametrize("kind", ["plain", "linear", "quadratic"])
@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_solves_that_converge_do_not_depend_on_where_they_started(kind, scheduler):
    plan = make_plan(cost_of(CALM), num_steps=5, iterations=40)
    images, _ = run(CALM, plan=plan, reuse=kind, scheduler=scheduler)
    torch.testing.assert_close(images, run(CALM, plan=plan, reuse="none", scheduler=scheduler)[0], atol=1e-4, rtol=0)


def test_on_a_smooth_trajectory_each_further_point_foretells_the_solution_better():
    # Random time embeddings make the solution jump from timestep to timestep, and so does clipping.
    model, template = contracting(), make_schedule(prediction_type="v_prediction")
    with torch.no_grad():
        model.time_embed.fc1.weight.zero_()
    plan = make_plan(cost_of(model), num_steps=25, iterations=25)
    first = []
    for kind in REUSE:
        _, report = run(model, plan=plan, reuse=kind, scheduler="ddim", template=template)
        first.append(sum(row[0] for row in report.residuals[3:]))
    assert all(worse > 4 * better for worse, better in pairwise(first))


@pytest.mark.parametrize("kind", REUSE)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_guidance_may_set_in_and_out_between_the_timesteps(kind, scheduler):
    plan = make_plan(cost_of(CALM), iterations=[2, 1, 3, 2, 1, 2, 2])
    choices = {"plan": plan, "reuse": kind, "scheduler": scheduler, "guidance": Guidance(3.0, (300, 750))}
    images, report = run(CALM, **choices)
    inside = [300 <= t <= 750 for t in report.timesteps]
    assert not inside[0]
    assert not inside[-1]
    assert any(inside)
    assert images.isfinite().all()
    alone, _ = run(CALM, indices=[1], labels=[2], **choices)
    torch.testing.assert_close(alone[0], images[1], atol=1e-4, rtol=0)
