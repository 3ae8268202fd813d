"""What steps ask of the network: keyed, alike everywhere, and as it was for configs that ask for nothing new."""

import pytest
import torch

from fpdm.diffusion import DiffusionLoss, make_schedule
from fpdm.fixedpoint import FixedIterations, Implicit, MultiStepJacobianFree, StochasticJacobianFree
from fpdm.keyed import generator
from fpdm.training.build import build
from fpdm.training.config import GRADIENTS, GradientConfig
from fpdm.training.course import differentiated, make_courses
from fpdm.training.draws import draw
from tests.training.runs import tiny

STEPS = range(300)


def courses(num_core=1, **settings):
    made = make_courses(GradientConfig(**{"no_grad_max": 4, "with_grad_max": 5, **settings}), num_core)
    return [made.draw(generator(0, "iterations", step)) for step in STEPS]


@pytest.mark.parametrize("num_core", [1, 2])
def test_without_exits_and_warm_starts_counts_are_drawn_as_ever(num_core):
    ranges = StochasticJacobianFree((0, 4), (1, 5)).for_group(num_core)
    for step, course in zip(STEPS, courses(num_core), strict=True):
        assert course.solve.gradient == ranges.draw(generator(0, "iterations", step))
        assert (course.solve.exits, course.warm) == ((), None)


def test_counts_of_a_seed_are_pinned():
    found = [course.solve.gradient for course in courses()[:6]]
    assert [(g.no_grad, g.with_grad) for g in found] == [(1, 5), (4, 1), (2, 4), (1, 1), (4, 3), (4, 1)]


def test_exits_leave_the_counts_as_they_are():
    for plain, exiting in zip(courses(), courses(exit_loss="target"), strict=True):
        assert plain.solve.gradient == exiting.solve.gradient


@pytest.mark.parametrize("warm", [0.0, 0.5])
@pytest.mark.parametrize("method", GRADIENTS)
def test_an_exit_is_earlier_and_has_a_gradient_where_one_has(method, warm):
    seen = set()
    for course in courses(gradient=method, exit_loss="target", warm_share=warm):
        later = differentiated(course.solve)
        if not course.solve.exits:
            assert list(later) == [1]  # the only iterate there is
            continue
        (exit,) = course.solve.exits
        assert 1 <= exit < later[-1]
        assert exit in later or len(later) == 1
        seen.add(exit - later[0])
    assert len(seen) > 1  # it is random


@pytest.mark.parametrize("method", GRADIENTS)
def test_warm_steps_are_a_share_and_leave_the_first_iterations_to_the_warm_start(method):
    cold, mixed = courses(gradient=method), courses(gradient=method, warm_share=0.3)
    warm = [course for course in mixed if course.warm is not None]
    assert abs(len(warm) / len(mixed) - 0.3) < 0.08
    for before, course in zip(cold, mixed, strict=True):
        if course.warm is None:
            assert course == before
            continue
        begun = before.solve.gradient.no_grad if isinstance(before.solve.gradient, MultiStepJacobianFree) else 4
        if isinstance(course.solve.gradient, Implicit):  # which makes its own iterations besides
            assert course.solve == before.solve
            assert course.warm.stopping == FixedIterations(begun)
            continue
        wanted = 1 if method == "unroll" else max(1, begun)
        assert course.warm.stopping == FixedIterations(wanted)
        assert differentiated(course.solve)[0] == 1
        assert len(differentiated(course.solve)) == len(differentiated(before.solve))


def test_a_course_is_the_same_whichever_process_asks_and_how_often():
    parts, again = (build(tiny(exit_loss="final", warm_share=0.5, **changes)) for changes in ({}, {"accumulation": 4}))
    assert [parts.course(step) for step in STEPS] == [again.course(step) for step in reversed(STEPS)][::-1]
    assert len({parts.course(step) for step in STEPS}) > 10


# --- noise of warm starts -------------------------------------------------------------------------------------------


def test_a_warm_start_draws_the_same_noise_and_more():
    cold, warm = (draw(0, 3, [0, 5], (1, 4, 4), 1000, 0.5, warm=warm) for warm in (False, True))
    for name in ("noise", "timesteps", "dropped"):
        assert torch.equal(getattr(cold, name), getattr(warm, name))
    assert (cold.later, cold.fresh) == (None, None)
    assert not torch.equal(warm.fresh, warm.noise)


def test_draws_of_a_slot_are_those_of_earlier_versions():
    found, g = draw(2, 3, [7], (1, 4, 4), 1000, 0.5), generator(2, "sample", 3, 7)
    assert found.timesteps.item() == torch.randint(1000, (), generator=g)
    assert found.dropped.item() == (torch.rand((), generator=g) < 0.5)
    assert torch.equal(found.noise[0], torch.randn((1, 4, 4), generator=g))


def test_warm_starts_are_noisier_by_the_spacings_of_6_to_100_timesteps():
    drawn = draw(0, 0, list(range(2000)), (1, 1, 1), 1000, 0.0, warm=True)
    ahead = drawn.later - drawn.timesteps
    within = ahead[drawn.timesteps < 800]
    assert (ahead >= 0).all()
    assert drawn.later.max() == 999
    assert 10 <= within.min() <= 12
    assert 160 <= within.max() <= 167
    assert (within < 41).float().mean() == pytest.approx(0.5, abs=0.05)  # half below the geometric mean


@pytest.fixture(scope="module")
def many():
    """x_t, noise, fresh noise and x_t' of one image at many draws: (N,) each, and the loss that made them."""
    loss = DiffusionLoss(make_schedule(beta_schedule="cosine", prediction_type="v_prediction"))
    drawn = draw(0, 0, list(range(300)), (1, 16, 16), 1000, 0.0, warm=True)
    return loss, drawn


@pytest.mark.parametrize(("t", "later"), [(0, 30), (300, 360), (700, 860), (900, 999)])
def test_the_noisier_image_is_a_draw_of_its_timesteps_marginal(many, t, later):
    """q(x_t' | x0) = N(a' x0, 1 - a'^2), whatever x_t was."""
    loss, drawn = many
    x0 = torch.full_like(drawn.noise, 0.7)
    t, later = (torch.full((len(x0),), value) for value in (t, later))
    x = loss.noisier(loss.noisy(x0, drawn.noise, t), t, later, drawn.fresh)
    a = loss.alpha_bar[later[0]]
    assert x.mean().item() == pytest.approx(0.7 * a.sqrt().item(), abs=0.015)
    assert x.var().item() == pytest.approx(1 - a.item(), rel=0.02)
    # and jointly: what x_t' shares with the noise of x_t is what x_t brings along
    shared = torch.corrcoef(torch.stack([x.flatten(), drawn.noise.flatten()]))[0, 1]
    kept = (a / loss.alpha_bar[t[0]] * (1 - loss.alpha_bar[t[0]]) / (1 - a)).sqrt()
    assert shared.item() == pytest.approx(kept.item(), abs=0.015)


def test_fresh_noise_is_not_correlated_with_the_noise(many):
    _, drawn = many
    both = torch.stack([drawn.noise.flatten(), drawn.fresh.flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.012
    assert drawn.fresh.std().item() == pytest.approx(1, abs=0.01)


def test_at_the_same_timestep_nothing_is_added(many):
    loss, drawn = many
    t = drawn.timesteps
    x_t = loss.noisy(torch.zeros_like(drawn.noise), drawn.noise, t)
    assert torch.equal(loss.noisier(x_t, t, t, drawn.fresh), x_t)


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
def test_the_noisiest_timestep_of_a_zero_terminal_snr_has_nothing_noisier(beta_schedule):
    schedule = make_schedule(beta_schedule=beta_schedule, prediction_type="v_prediction", zero_terminal_snr=True)
    loss, x, t = DiffusionLoss(schedule), torch.randn(2, 1, 4, 4), torch.tensor([999, 998])
    noisier = loss.noisier(x, t, torch.tensor([999, 999]), fresh := torch.randn(2, 1, 4, 4))
    assert torch.equal(noisier[0], x[0])
    torch.testing.assert_close(noisier[1], fresh[1])
