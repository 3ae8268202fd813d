"""The profile of a model's errors, and the iterations that follow from it: exact, and as a hand finds them."""

import math
from itertools import product
from math import acos, cos, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpdm.diffusion import PREDICTION_TYPES, make_schedule
from fpdm.sampling import Profile, Stepper, cost_of, image_generators, initial_noise, make_plan, measure_profile
from fpdm.sampling.profile import CONVERGED, LEVELS, MOST, allocated, weights
from tests.sampling.tiny import CALM, TEMPLATE, contracting, run, tiny

ANGLES = (1.2, 0.8, 0.4)  # from noise to image
KNOWN = [cos(angle) ** 2 for angle in ANGLES]
LABELS = torch.tensor([0, 2, 1])


def levels_of(template, num_steps):
    stepper = Stepper(template, "ddim", num_steps, learned_variance=False)
    return [stepper.level(call) for call in range(num_steps)]


def leaving(errors, counts):
    return sum(errors[step, n - 1] for step, n in enumerate(counts))


def noise(model=CALM, count=3):
    return initial_noise(model, image_generators(5, range(count)))


# Allocation


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_no_other_counts_of_the_sum_leave_a_smaller_error(steps, most, more, seed):
    total = steps + more % (steps * (most - 1) + 1)
    errors = np.random.default_rng(seed).random((steps, most))  # also such as rise with iterations
    counts = allocated(errors, total)
    assert sum(counts) == total
    assert len(counts) == steps
    assert set(counts) <= set(range(1, most + 1))
    others = (other for other in product(range(1, most + 1), repeat=steps) if sum(other) == total)
    assert leaving(errors, counts) == pytest.approx(min(leaving(errors, other) for other in others))


@pytest.mark.parametrize("total", [0, 2, 13])
def test_a_sum_that_counts_cannot_have_is_refused(total):
    with pytest.raises(ValueError, match=f"3 counts of 1 to 4 cannot sum to {total}"):
        allocated(np.ones((3, 4)), total)


def test_many_timesteps_and_iterations_are_shared_out_exactly():
    errors = np.exp(-np.arange(1, 13) * np.linspace(0.1, 2, 200)[:, None])
    assert [sum(allocated(errors, total)) for total in (200, 777, 2400)] == [200, 777, 2400]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_errors_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        allocated(np.array([[bad, 1.0], [2.0, 1.0]]), 3)


# Weights


def test_weights_by_hand():
    # rho is 2, 1 and 1/2: each step goes half of the way that is left, the last one all of it.
    assert weights([0.2, 0.5, 0.8]) == pytest.approx([0.25, 0.25, 1])
    assert weights([0.1]) == pytest.approx([1])
    assert weights([0.0, 0.5]) == pytest.approx([1, 1], abs=1e-5)  # from noise without any signal


def test_the_weights_of_heuns_calls_are_what_a_change_of_their_x0_does_to_the_step():
    """After a step of two calls, in units of a clean image, by the change times the square root of the weight."""
    template = make_schedule()
    stepper = Stepper(template, "heun", 3, False)
    assert stepper.level(1) == stepper.level(2)
    found, level = weights([stepper.level(call) for call in range(3)]), torch.tensor(stepper.level(2))

    def after(*x0s):
        fresh, x = Stepper(template, "heun", 3, False), torch.full((1, 1, 1, 1), 0.7)
        for call, x0 in enumerate(x0s):
            here = torch.tensor(fresh.level(call))
            noise = (x - here.sqrt() * x0) / (1 - here).sqrt()
            x = fresh.step(noise, call, x, [])
        return float(x / level.sqrt())

    moved = [abs(after(*x0s) - after(0.0, 0.0)) for x0s in ((0.1, 0.0), (0.0, 0.1))]
    assert moved == pytest.approx([0.1 * sqrt(found[0]), 0.1 * sqrt(found[1])], rel=1e-3)
    assert found[2] == 1


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
def test_no_step_has_a_weight_above_one_and_the_last_one_has_one(steps, zero_terminal_snr):
    template = make_schedule(prediction_type="v_prediction", zero_terminal_snr=zero_terminal_snr)
    found = weights(levels_of(template, steps))
    assert found.shape == (steps,)
    assert found[-1] == 1
    assert (found >= 0).all()
    assert (found <= 1).all()


# Other noise levels


def test_the_errors_at_measured_levels_are_the_measured_ones_and_between_them_geometric_means():
    profile = Profile(np.array(KNOWN), np.array([[8.0, 4.0], [2.0, 1.0], [2.0, 1e-3]]))
    assert profile.at(KNOWN) == pytest.approx(profile.errors)
    between = [cos(1.0) ** 2, cos(0.6) ** 2]
    assert profile.at(between) == pytest.approx(np.array([[4.0, 2.0], [2.0, sqrt(1e-3)]]))
    beyond = [cos(1.5) ** 2, cos(0.1) ** 2]
    assert profile.at(beyond) == pytest.approx(profile.errors[[0, 2]])


def test_a_converged_error_of_zero_is_a_very_small_one():
    profile = Profile(np.array(KNOWN), np.array([[1.0, 0.0]] * 3))
    assert np.isfinite(profile.at([0.5])).all()
    assert profile.at([0.5])[0] == pytest.approx([1, 1e-20])


def test_iterations_go_to_where_they_remove_the_most_weighted_error():
    steep, flat = [1.0, 0.1, 0.01], [1.0, 0.99, 0.98]
    assert Profile(np.array(KNOWN), np.array([steep, flat, flat])).iterations(KNOWN, 5) == (3, 1, 1)
    assert Profile(np.array(KNOWN), np.array([flat, steep, flat])).iterations(KNOWN, 5) == (1, 3, 1)
    # Where all steps are alike, the last one weighs the most.
    assert Profile(np.array(KNOWN), np.array([steep] * 3)).iterations(KNOWN, 4) == (1, 1, 2)


@pytest.mark.parametrize(("total", "counts"), [(9, (3, 3, 3)), (10, (3, 3, 4)), (13, (4, 4, 5)), (300, (100,) * 3)])
def test_what_is_beyond_the_measured_iterations_is_spread_evenly(total, counts):
    profile = Profile(np.array(KNOWN), np.array([[3.0, 2.0, 1.0]] * 3))
    assert profile.iterations(KNOWN, total) == counts


def test_fewer_iterations_than_timesteps_are_refused():
    with pytest.raises(ValueError, match="cannot sum to 2"):
        Profile(np.array(KNOWN), np.ones((3, 3))).iterations(KNOWN, 2)


# Measuring


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("learned_variance", [True, False])
def test_the_errors_of_a_model_that_converges_fall_with_its_iterations(kind, learned_variance):
    template = make_schedule(prediction_type=kind, learned_variance=learned_variance)
    model = contracting(learned_variance=learned_variance)
    profile = measure_profile(model, template, noise(), LABELS)
    assert profile.errors.shape == (LEVELS, MOST)
    assert (np.diff(profile.alpha_bar) > 0).all(), "from noise to image"
    assert profile.alpha_bar == pytest.approx(levels_of(template, LEVELS), rel=1e-4)
    assert np.isfinite(profile.errors).all()
    assert (profile.errors >= 0).all()
    assert (profile.errors[:, 3] < profile.errors[:, 0]).all()
    assert (profile.errors[:, -1] < 0.05 * profile.errors[:, 0]).all()


def test_the_first_errors_are_those_of_x0_by_hand():
    """With v: x0 = sqrt(a) x - sqrt(1 - a) v, clipped. The first solve starts from scratch."""
    x = noise()
    found = measure_profile(CALM, TEMPLATE, x, LABELS)
    level = found.alpha_bar[0]

    def x0(iterations):
        with torch.no_grad():
            v = CALM(x, 999, LABELS, iterations=iterations).sample[:, :1]
        return (sqrt(level) * x - sqrt(1 - level) * v).clamp(-1, 1)

    by_hand = [(x0(n) - x0(CONVERGED)).square().mean().item() for n in (1, 2, 5)]
    assert found.errors[0, [0, 1, 4]] == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize("classes", [3, 0])
def test_a_model_is_measured_without_classes_too(classes):
    model = contracting(num_classes=classes)
    without = measure_profile(model, TEMPLATE, noise(), None)
    assert without.errors.shape == (LEVELS, MOST)
    if classes:
        null = measure_profile(model, TEMPLATE, noise(), torch.full((3,), model.null_class))
        assert np.array_equal(without.errors, null.errors)
        assert not np.allclose(without.errors, measure_profile(model, TEMPLATE, noise(), LABELS).errors)


def test_a_schedule_that_ends_without_signal_is_measured():
    template = make_schedule(prediction_type="v_prediction", zero_terminal_snr=True)
    profile = measure_profile(CALM, template, noise(), LABELS)
    assert profile.alpha_bar[0] == pytest.approx(0, abs=1e-6)
    assert np.isfinite(profile.errors).all()
    assert sum(profile.iterations(levels_of(template, 7), 20)) == 20


def test_a_model_whose_long_solves_diverge_has_no_plan_of_chance():
    """A sampling of two iterations each draws finite images of it."""
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    assert run(model, plan=make_plan(cost_of(model), iterations=[2] * 20))[0].isfinite().all()
    try:
        profile = measure_profile(model, TEMPLATE, noise(model), LABELS)
    except ValueError:
        return
    assert np.isfinite(profile.errors).all()


def test_the_order_of_the_images_does_not_matter():
    x, order = noise(), torch.tensor([2, 0, 1])
    one, other = (measure_profile(CALM, TEMPLATE, x[i], LABELS[i]) for i in (torch.arange(3), order))
    assert other.errors == pytest.approx(one.errors, rel=1e-3, abs=1e-9)


def test_measuring_leaves_the_network_and_the_random_numbers_as_they_were():
    before, state = {name: w.clone() for name, w in CALM.state_dict().items()}, torch.get_rng_state()
    measure_profile(CALM, TEMPLATE, noise(), LABELS)
    assert all(torch.equal(w, before[name]) and w.grad is None for name, w in CALM.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_levels_are_those_of_trailing_timesteps():
    alpha_bar = (1 - TEMPLATE.betas.double()).cumprod(0)
    assert levels_of(TEMPLATE, 4) == pytest.approx([float(alpha_bar[t]) for t in (999, 749, 499, 249)])
    assert [round(acos(sqrt(level)), 3) for level in levels_of(TEMPLATE, 1)] == [1.564]
