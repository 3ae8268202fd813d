"""Predicted seconds: linear in timesteps and iterations, and near to what a sampling takes."""

import time

import pytest

from fpdm.models import DiT
from fpdm.sampling import Plan, Seconds, cost_of, make_plan, measure_seconds
from tests.networks import SIZES, randomised
from tests.sampling.tiny import DIT, MODEL, run, tiny

BATCH = 16
# Not so small that the scheduler, which a prediction leaves out, takes longer than the network.
LARGER = {"sample_size": 16, "hidden_size": 64}
WIDE, DEEP = tiny(**LARGER), randomised(DiT(**{**SIZES, **LARGER}, depth=10))
PATIENCE = 8  # attempts: other work on the machine may disturb any one of them


def plan_of(*iterations):
    return Plan(iterations, (0,) * len(iterations))


def test_seconds_are_linear_in_timesteps_and_iterations():
    seconds = Seconds(4, 0.5, 0.25)
    assert seconds.of(plan_of(1)) == pytest.approx((0.5 + 0.25) / 4)
    assert seconds.of(plan_of(3, 1, 4)) == pytest.approx((3 * 0.5 + 8 * 0.25) / 4)
    assert seconds.of(plan_of(*[2] * 10)) == pytest.approx(10 * seconds.of(plan_of(2)))
    assert Seconds(4, 0.5, 0.0).of(plan_of(None, None)) == pytest.approx(2 * 0.5 / 4)


def test_a_fixed_point_takes_time_per_iteration_and_an_explicit_network_none():
    assert any(measure_seconds(MODEL, BATCH).per_iteration > 0 for _ in range(PATIENCE))
    explicit = measure_seconds(DIT, BATCH)
    assert explicit.fixed > 0
    assert (explicit.batch_size, explicit.per_iteration) == (BATCH, 0)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_networks_without_classes_and_any_batch_are_timed(batch_size):
    found = measure_seconds(tiny(num_classes=0), batch_size)
    assert found.batch_size == batch_size
    assert min(found.fixed, found.per_iteration) >= 0
    assert found.of(plan_of(5)) > 0


@pytest.mark.parametrize(
    ("model", "choices"),
    [(WIDE, {"iterations": [2] * 10}), (WIDE, {"iterations": [12] * 4}), (DEEP, {"num_steps": 10})],
    ids=["smoothing", "long solves", "explicit"],
)
def test_a_sampling_takes_about_the_predicted_seconds(model, choices):
    plan, ratios = make_plan(cost_of(model), **choices), []
    for _ in range(PATIENCE):
        predicted = measure_seconds(model, BATCH).of(plan) * BATCH
        started = time.perf_counter()
        run(model, indices=range(BATCH), plan=plan, labels=[0] * BATCH)
        ratios.append((time.perf_counter() - started) / predicted)
        if 0.5 < ratios[-1] < 2:
            return
    pytest.fail(f"actual by predicted seconds: {ratios}")
