"""Schedulers against closed forms: diffusers' own DDIM, and data whose best denoiser is known.

`ab` is alpha_bar_t, `a` its square root, x_t = a x0 + sqrt(1 - ab) eps.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from fpdm.diffusion import make_schedule, target
from fpdm.sampling import SCHEDULERS, Stepper, calls_of, image_generators, trailing_timesteps

KINDS = ("epsilon", "v_prediction", "sample")
MU, S = 0.3, 0.5  # data N(MU, S^2), every pixel by itself


def schedule(kind="epsilon", **settings):
    return make_schedule(prediction_type=kind, **{"learned_variance": False, **settings})


def prediction(kind, x0_of, x, ab):
    """What a network of this kind would return if its x0 were `x0_of(x, ab)`. In float64: a is as small as 0.006."""
    x, ab = x.double(), ab.double()
    x0 = x0_of(x, ab)
    return target(kind, x0, (x - ab.sqrt() * x0) / (1 - ab).sqrt(), ab).float()


def gaussian_x0(x, ab):
    """E[x0 | x_t] for data N(MU, S^2)."""
    a = ab.sqrt()
    return MU + a * S**2 * (x - a * MU) / (ab * S**2 + 1 - ab)


def two_points_x0(x, ab):
    """E[x0 | x_t] for data that is -0.7 or 0.7: not linear in x."""
    return 0.7 * torch.tanh(0.7 * ab.sqrt() * x / (1 - ab))


def draw(stepper, x, x0_of, kind, generators=None):
    for index, t in enumerate(stepper.timesteps):
        x = stepper.step(prediction(kind, x0_of, x, stepper.alpha_bar[t]), index, x, generators)
    return x


# Timesteps


def test_trailing_timesteps_at_every_number_of_steps():
    for n in range(1, 1001):
        timesteps = trailing_timesteps(1000, n)
        assert len(timesteps) == n
        assert timesteps[0] == 999
        assert timesteps[-1] >= 0
        assert all(following < t for t, following in pairwise(timesteps))
        assert timesteps == (np.round(1000 - np.arange(n) * 1000 / n) - 1).astype(int).tolist()


@pytest.mark.parametrize("n", [1, 7, 49, 999])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_step_through_the_same_timesteps(name, n):
    stepper = Stepper(schedule(), name, n, learned_variance=False)
    distinct = list(dict.fromkeys(stepper.timesteps))
    assert stepper.scheduler.timesteps.tolist() == stepper.timesteps
    assert len(stepper.timesteps) == n
    assert distinct == trailing_timesteps(1000, (n + 1) // 2 if name == "heun" else n)


def test_heun_calls_the_network_twice_at_every_timestep_but_the_first():
    # The second call of a step is at the timestep it goes to; the last step goes to a clean image, and has none.
    assert Stepper(schedule(), "heun", 7, learned_variance=False).timesteps == [999, 749, 749, 499, 499, 249, 249]


# Against diffusers


@pytest.mark.parametrize("n", [1, 5, 8, 40, 125, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_is_diffusers_ddim_where_that_one_chains(kind, n):
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = DDIMScheduler(prediction_type=kind, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(n)
    x = noise
    for t in theirs.timesteps:
        x = theirs.step(prediction(kind, two_points_x0, x, theirs.alphas_cumprod[t]), t, x).prev_sample
    ours = draw(Stepper(schedule(kind), "ddim", n, learned_variance=False), noise, two_points_x0, kind)
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=0)


# Against the probability flow of Gaussian data, which keeps the quantile of every pixel


def flow_error(name, kind, n, zero_terminal_snr=False, beta_schedule="linear"):
    template = schedule(kind, zero_terminal_snr=zero_terminal_snr, beta_schedule=beta_schedule)
    stepper = Stepper(template, name, n, learned_variance=False)
    noise, ab = torch.linspace(-3, 3, 64).view(1, 1, 8, 8), stepper.alpha_bar[-1].double()
    exact = MU + S * (noise - ab.sqrt() * MU) / (ab * S**2 + 1 - ab).sqrt()
    return (draw(stepper, noise, gaussian_x0, kind) - exact).abs().max().item()


DETERMINISTIC = [("epsilon", False), ("v_prediction", False), ("sample", False), ("v_prediction", True)]


@pytest.mark.parametrize(("kind", "zero_terminal_snr"), DETERMINISTIC)
@pytest.mark.parametrize(("fewer", "n", "more"), [(5, 7, 8), (25, 30, 40), (40, 48, 50), (250, 333, 500)])
def test_ddim_is_of_first_order_at_any_number_of_steps(kind, zero_terminal_snr, fewer, n, more):
    # n x error rises slowly and smoothly to a limit. Where timesteps do not chain, which diffusers' DDIM shows at the
    # n that do not divide 1000, it leaves the line between its neighbours that do.
    low, middle, high = (k * flow_error("ddim", kind, k, zero_terminal_snr) for k in (fewer, n, more))
    assert 3.5 < low < middle < high < 4.6


@pytest.mark.parametrize(("kind", "zero_terminal_snr"), DETERMINISTIC)
@pytest.mark.parametrize("n", [7, 10, 30, 48, 100, 333, 1000])
def test_dpm_is_of_second_order_at_any_number_of_steps(kind, zero_terminal_snr, n):
    # What is left at 1000 steps is the distance of the last timestep from the data.
    assert flow_error("dpm++", kind, n, zero_terminal_snr) < 30 / n**2 + 1.5e-4


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "heun"])
def test_at_zero_terminal_snr_v_is_minus_x0(name):
    # diffusers' DPM-Solver has 2**-24 in its table there, which would let 1/4096 of the noise through.
    v, noise = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    stepper = Stepper(schedule("v_prediction", zero_terminal_snr=True), name, 1, learned_variance=False)
    torch.testing.assert_close(stepper.step(v, 0, noise, []), -v, atol=1e-6, rtol=0)


# The solvers of second order, and those that diffusers has, too


@pytest.mark.parametrize("name", ["unipc", "heun"])
@pytest.mark.parametrize("n", [7, 15, 49, 99, 333, 999])
def test_heun_and_unipc_follow_the_flow_of_gaussian_data(name, n):
    # 0.5 / n is what the last timestep, about 1000 / n, leaves between it and the data: the noise there is not small.
    assert flow_error(name, "epsilon", n) < 80 / n**2 + 0.65 / n


def order_error(name, intervals):
    """The distance from the flow before the last step, on a schedule even in the log signal-to-noise ratio and bounded
    at both ends: there the error of a solver is a power of the number of its steps."""
    table = torch.sigmoid(2 * torch.linspace(2, -3, 1000, dtype=torch.float64))
    betas = 1 - table / torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    template = DDPMScheduler(trained_betas=betas.tolist(), prediction_type="epsilon", clip_sample=False)
    stepper = Stepper(template, name, 2 * intervals - 1 if name == "heun" else intervals, learned_variance=False)
    quantile = torch.linspace(-3, 3, 64).view(1, 1, 8, 8).double()
    first, last = (
        MU * ab.sqrt() + (ab * S**2 + 1 - ab).sqrt() * quantile
        for ab in (stepper.alpha_bar[stepper.timesteps[index]].double() for index in (0, -1))
    )
    x = first.float()
    for index, t in enumerate(stepper.timesteps[:-1]):
        x = stepper.step(prediction("epsilon", gaussian_x0, x, stepper.alpha_bar[t]), index, x, None)
    return (x - last).abs().max().item()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("ddim", 1.9, 2.1),
        ("euler", 1.9, 2.1),
        ("dpm++", 3.3, 4.5),
        ("heun", 3.8, 4.3),
        ("unipc", 6.5, 10),  # its corrector gains an order
    ],
)
def test_twice_the_steps_divide_the_error_by_a_power_of_two(name, low, high):
    for fewer, more in ((50, 100), (100, 200)):
        assert low < order_error(name, fewer) / order_error(name, more) < high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_of_gaussian_data_have_its_mean_and_variance(name, kind):
    if name == "ddpm":
        mean, variance, *_ = ddpm_moments(199, kind, true_fraction, False)
        deviation = math.sqrt(variance)
    else:  # x0 is linear in the noise, so two points of it tell of all
        low, high = draw(Stepper(schedule(kind), name, 199, False), torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1),
                         gaussian_x0, kind).flatten().tolist()  # fmt: skip
        mean, deviation = (low + high) / 2, (high - low) / 2
    assert mean == pytest.approx(MU, abs=0.006)
    assert deviation == pytest.approx(S, abs=0.008)


@pytest.mark.parametrize("n", [5, 9, 25])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ddpm"])
def test_all_kinds_of_prediction_draw_the_same(name, n):
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    first, *others = (
        draw(Stepper(schedule(kind), name, n, learned_variance=False), noise, two_points_x0, kind) for kind in KINDS
    )
    for other in others:
        torch.testing.assert_close(first, other, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n", [5, 8, 25, 40, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "theirs"),
    [("euler", EulerDiscreteScheduler), ("unipc", UniPCMultistepScheduler), ("heun", HeunDiscreteScheduler)],
)
def test_what_diffusers_has_is_the_same_there(name, theirs, kind, n):
    # Where its timesteps are ours: at the n that divide 1000.
    theirs = theirs(
        prediction_type=kind, timestep_spacing="trailing", beta_schedule="linear", beta_start=1e-4, beta_end=0.02
    )
    theirs.set_timesteps(n)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = noise * theirs.init_noise_sigma
    for t in theirs.timesteps:
        seen = theirs.scale_model_input(x, t)
        output = prediction(kind, two_points_x0, seen, theirs.alphas_cumprod[int(t)])
        x = theirs.step(output, t, x).prev_sample
    stepper = Stepper(schedule(kind), name, 2 * n - 1 if name == "heun" else n, learned_variance=False)
    assert stepper.timesteps == [int(t) for t in theirs.timesteps]
    torch.testing.assert_close(draw(stepper, noise, two_points_x0, kind), x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_takes_the_order_of_its_template(order):
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    settings = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    template = UniPCMultistepScheduler(solver_order=order, prediction_type="sample", **settings)
    theirs = UniPCMultistepScheduler(
        solver_order=order, prediction_type="sample", timestep_spacing="trailing", **settings
    )
    theirs.set_timesteps(8)
    x = noise
    for t in theirs.timesteps:
        x = theirs.step(prediction("sample", two_points_x0, x, theirs.alphas_cumprod[t]), t, x).prev_sample
    stepper = Stepper(template, None, 8, learned_variance=False)
    torch.testing.assert_close(draw(stepper, noise, two_points_x0, "sample"), x, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "template",
    [
        schedule(beta_schedule="cosine"),
        schedule("v_prediction", zero_terminal_snr=True),
        schedule("sample", beta_schedule="cosine"),
    ],
)
def test_heun_begins_with_a_first_order_step_where_the_noise_has_no_signal(template):
    kind = template.config.prediction_type
    stepper = Stepper(template, "heun", 6, learned_variance=False)
    assert stepper.timesteps == [999, 749, 499, 499, 249, 249]
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    first = prediction(kind, two_points_x0, noise, stepper.alpha_bar[999])
    theirs = Stepper(template, "ddim", 4, learned_variance=False)
    torch.testing.assert_close(stepper.step(first, 0, noise, []), theirs.step(first, 0, noise, []), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="take 4 or 6"):
        Stepper(template, "heun", 5, learned_variance=False)


@pytest.mark.parametrize(("zero_terminal_snr", "beta_schedule"), [(True, "linear"), (False, "cosine")])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("n", [8, 16, 48, 98, 198])
def test_heun_from_noise_without_signal_follows_the_flow(kind, n, zero_terminal_snr, beta_schedule):
    assert flow_error("heun", kind, n, zero_terminal_snr, beta_schedule) < 80 / n**2 + 1.3 / n


@pytest.mark.parametrize("calls", [2, 4, 1000])
def test_heun_refuses_an_even_number_of_calls_by_naming_its_neighbours(calls):
    with pytest.raises(ValueError, match=f"take {calls - 1} or {calls + 1}$"):
        Stepper(schedule(), "heun", calls, learned_variance=False)
    for other in (calls - 1, calls + 1):
        assert len(Stepper(schedule(), "heun", other, learned_variance=False).timesteps) == other


@pytest.mark.parametrize(
    "kind", [EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler, DPMSolverMultistepScheduler]
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_templates_of_every_class_serve_every_scheduler(kind, name):
    settings = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction"}
    x0 = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    ours = schedule("v_prediction")
    assert torch.equal(one_step(kind(**settings), name, x0, index=1), one_step(ours, name, x0, index=1))


# DDPM's moments


def reverse_variances(ab, previous):
    """The lower and upper bound of the variance of p(x_s | x_t), and the true one for the Gaussian data."""
    beta = 1 - ab / previous
    lower = (1 - previous) / (1 - ab) * beta
    given_x = S**2 * (1 - ab) / (ab * S**2 + 1 - ab)  # of x0 once x_t is known
    return lower, beta, lower + (previous.sqrt() * beta / (1 - ab)) ** 2 * given_x


def true_fraction(ab, previous):
    """Where the true log variance lies between the bounds, in [-1, 1]: what a perfect network returns."""
    lower, upper, true = reverse_variances(ab, previous)
    return 2 * (true / lower).log() / (upper / lower).log() - 1


def ddpm_moments(n, kind, fraction, zero_terminal_snr, images=128):
    """Mean and variance over all pixels of many DDPM samples; `fraction` None is the variance that is not learned."""
    learned = fraction is not None
    template = schedule(kind, zero_terminal_snr=zero_terminal_snr, learned_variance=learned)
    stepper = Stepper(template, "ddpm", n, learned_variance=learned)
    generators = image_generators(0, range(images))
    x = torch.stack([torch.randn(1, 16, 16, generator=g) for g in generators])
    table = [*stepper.alpha_bar[stepper.timesteps].double(), torch.ones((), dtype=torch.float64)]
    for index, (ab, previous) in enumerate(pairwise(table)):
        output = prediction(kind, gaussian_x0, x, ab)
        if learned:
            output = torch.cat([output, torch.full_like(output, float(fraction(ab, previous)))], dim=1)
        x = stepper.step(output, index, x, generators)
    return x.mean().item(), x.var().item(), x.numel(), table


def agree(mean, variance, count, expected_mean, expected_variance):
    """Within 4.5 standard errors of a Gaussian sample's mean and variance; the seed is fixed, so never by chance."""
    assert abs(mean - expected_mean) < 4.5 * math.sqrt(expected_variance / count)
    assert abs(variance / expected_variance - 1) < 4.5 * math.sqrt(2 / count)


SCHEDULES = [("epsilon", False), ("v_prediction", False), ("sample", False), ("v_prediction", True)]


@pytest.mark.parametrize(("kind", "zero_terminal_snr"), SCHEDULES)
def test_ddpm_with_the_true_variance_is_exact_at_any_number_of_steps(kind, zero_terminal_snr):
    mean, variance, count, table = ddpm_moments(6, kind, true_fraction, zero_terminal_snr)
    ab = table[-2].item()  # every x_t has its true distribution; the last step returns E[x0 | x_t] and adds nothing
    agree(mean, variance, count, MU, ab * S**4 / (ab * S**2 + 1 - ab))


@pytest.mark.parametrize(("kind", "zero_terminal_snr"), SCHEDULES)
@pytest.mark.parametrize("fraction", [None, lambda *_: -1.0, lambda *_: 1.0], ids=["small", "lower", "upper"])
def test_ddpm_with_another_variance_follows_its_own_recursion(kind, zero_terminal_snr, fraction):
    mean, variance, count, table = ddpm_moments(12, kind, fraction, zero_terminal_snr)
    expected_mean, expected_variance = 0.0, 1.0
    for ab, previous in pairwise(table):
        lower, upper, _ = reverse_variances(ab, previous)
        gain = ab.sqrt() * S**2 / (ab * S**2 + 1 - ab)  # E[x0 | x] = gain x + offset
        offset = MU - gain * ab.sqrt() * MU
        on_x0 = previous.sqrt() * (1 - ab / previous) / (1 - ab)
        on_x = (ab / previous).sqrt() * (1 - previous) / (1 - ab)
        added = 0 if previous == 1 else upper if fraction and fraction() > 0 else lower
        expected_mean = (on_x0 * gain + on_x) * expected_mean + on_x0 * offset
        expected_variance = (on_x0 * gain + on_x) ** 2 * expected_variance + added
    agree(mean, variance, count, float(expected_mean), float(expected_variance))


def test_ddpm_without_learned_variance_comes_close_to_the_data_in_many_steps():
    mean, variance, *_ = ddpm_moments(500, "epsilon", None, False, images=32)
    assert mean == pytest.approx(MU, abs=0.02)
    assert variance == pytest.approx(S**2, rel=0.05)


# Clipping, learned variance, the last step


def one_step(template, name, output, learned_variance=False, index=0, n=5):
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    stepper = Stepper(template, name, n, learned_variance)
    for earlier in range(index):  # multistep schedulers count their steps
        stepper.step(output, earlier, x, image_generators(0, range(2)))
    return stepper.step(output, index, x, image_generators(0, range(2)))


@pytest.mark.parametrize("index", [0, 1, 4])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("limit", [1.0, 0.5])
def test_all_schedulers_clip_the_predicted_image_alike(name, index, limit):
    x0 = torch.linspace(-3, 3, 32).view(2, 1, 4, 4)
    clipping = DDPMScheduler(prediction_type="sample", clip_sample=True, clip_sample_range=limit)
    free = DDPMScheduler(prediction_type="sample", clip_sample=False)
    clipped = one_step(clipping, name, x0, index=index)
    assert torch.equal(clipped, one_step(free, name, x0.clamp(-limit, limit), index=index))
    assert not torch.allclose(clipped, one_step(free, name, x0, index=index))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_only_ddpm_uses_the_learned_variance(name, kind):
    mean, variance = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    template = schedule(kind, learned_variance=True)
    given = one_step(template, name, torch.cat([mean, variance], dim=1), learned_variance=True)
    assert torch.equal(given, one_step(template, name, mean)) == (name != "ddpm")
    assert given.shape == mean.shape


@pytest.mark.parametrize("n", [1, 5, 999])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_last_step_returns_the_predicted_image_and_draws_nothing(name, n):
    # At n < 1000 the last timestep is not 0, and diffusers' DDPM would add noise there.
    stepper = Stepper(schedule("sample"), name, n, learned_variance=False)
    generators = image_generators(0, range(2))
    before = [g.get_state() for g in generators]
    x0 = torch.rand(2, 1, 4, 4)
    assert torch.equal(stepper.step(x0, n - 1, torch.randn(2, 1, 4, 4), generators), x0)
    assert all(torch.equal(state, g.get_state()) for state, g in zip(before, generators, strict=True))


@pytest.mark.parametrize(("name", "draws"), [(name, name == "ddpm") for name in SCHEDULERS])
def test_each_image_draws_from_its_own_generator(name, draws):
    x0, x = torch.rand(2, 2, 1, 4, 4)
    outcomes = [
        Stepper(schedule("sample"), name, 5, False).step(x0, 0, x, image_generators(0, indices))
        for indices in ([0, 1], [0, 2])
    ]
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1]) != draws


# Which schedulers are taken


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (DDPMScheduler(prediction_type="sample", clip_sample=False), "ddpm"),
        (DDIMScheduler(prediction_type="sample", clip_sample=False), "ddim"),
        (DPMSolverMultistepScheduler(prediction_type="sample"), "dpm++"),
        (UniPCMultistepScheduler(prediction_type="sample"), "unipc"),
        (EulerDiscreteScheduler(prediction_type="sample"), "euler"),
        (HeunDiscreteScheduler(prediction_type="sample"), "heun"),
    ],
)
def test_without_a_name_the_template_is_what_it_is(template, name):
    x0 = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    for index in (0, 1):
        assert torch.equal(one_step(template, None, x0, index=index), one_step(template, name, x0, index=index))


def test_a_noise_schedule_given_as_a_table_reaches_every_scheduler():
    betas = np.linspace(0.01, 0.2, 20).tolist()
    template = DDPMScheduler(num_train_timesteps=20, trained_betas=betas, prediction_type="sample", clip_sample=False)
    for name in SCHEDULERS:
        assert Stepper(template, name, 5, False).scheduler.betas.tolist() == pytest.approx(betas)


@pytest.mark.parametrize(
    ("template", "name", "text"),
    [
        (schedule(), "ddimm", "Did you mean 'ddim'"),
        (PNDMScheduler(), None, "PNDMScheduler is not supported"),
        (DDPMScheduler(thresholding=True), None, "thresholding"),
        (DDPMScheduler(variance_type="fixed_large"), None, "variance_type is 'fixed_large'"),
        (UniPCMultistepScheduler(predict_x0=False), None, "predict_x0 is False"),
        (DPMSolverMultistepScheduler(lower_order_final=False), None, "lower_order_final is False"),
        (EulerDiscreteScheduler(use_karras_sigmas=True), None, "use_karras_sigmas"),
        (HeunDiscreteScheduler(use_karras_sigmas=True), "ddim", "use_karras_sigmas"),
        (UniPCMultistepScheduler(use_exponential_sigmas=True), None, "use_exponential_sigmas"),
        (DPMSolverMultistepScheduler(use_karras_sigmas=True), None, "use_karras_sigmas"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), None, "use_flow_sigmas"),
        pytest.param(
            FlowMatchEulerDiscreteScheduler(), None, "not supported",
        ),
        pytest.param(
            DPMSolverMultistepScheduler(prediction_type="flow_prediction"), None, "flow_prediction",
        ),
        pytest.param(
            DDPMScheduler(rescale_betas_zero_snr=True, clip_sample=False), None, "epsilon",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_stepped_is_refused(template, name, text):
    with pytest.raises(ValueError, match=text):
        Stepper(template, name, 5, learned_variance=False)


# What is put in the place of x


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"ddpm"}))
@pytest.mark.parametrize("at", [0, 10, 11, 29])
def test_what_is_put_in_the_place_of_x_goes_on_along_the_flow(name, at):
    """A change of x shrinks as the deviation of the data does, whatever a solver keeps of earlier steps."""
    stepper = Stepper(schedule(), name, 31, learned_variance=False)
    unchanged, x = (torch.full((2, 1, 1, 1), 0.3) for _ in range(2))
    plain = draw(Stepper(schedule(), name, 31, learned_variance=False), unchanged, gaussian_x0, "epsilon")
    for index, t in enumerate(stepper.timesteps):
        x = stepper.step(prediction("epsilon", gaussian_x0, x, stepper.alpha_bar[t]), index, x, None)
        if index == at:
            x = stepper.replaced(x, x + 1.0)
    start, end = (stepper.alpha_bar[stepper.timesteps[i]].double() for i in (at + 1, -1))
    deviation = [(ab * S**2 + 1 - ab).sqrt() for ab in (start, end)]
    left = deviation[1] / deviation[0] * end.sqrt() * S**2 / deviation[1] ** 2
    torch.testing.assert_close(x - plain, torch.full_like(x, left), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_what_is_put_in_the_place_of_x_and_is_the_same_changes_nothing(name):
    steppers = [Stepper(schedule(), name, 9, learned_variance=False) for _ in range(2)]
    generators = [[torch.Generator().manual_seed(0)] for _ in steppers]
    x, same = (torch.full((1, 1, 1, 1), 0.3) for _ in steppers)
    for index, t in enumerate(steppers[0].timesteps):
        for which, (stepper, drawn) in enumerate(zip(steppers, generators, strict=True)):
            value = same if which else x
            value = stepper.step(prediction("epsilon", gaussian_x0, value, stepper.alpha_bar[t]), index, value, drawn)
            x, same = (x, stepper.replaced(value, value.clone())) if which else (value, same)
    assert torch.equal(x, same)


def test_a_heun_template_has_the_zero_terminal_snr_that_its_config_asks_for():
    template = schedule("v_prediction", zero_terminal_snr=True)
    heun = HeunDiscreteScheduler.from_config(template.config)
    assert calls_of(heun, None) == calls_of(template, "heun")
    for name in SCHEDULERS:
        own, other = (Stepper(one, name, 10, learned_variance=False) for one in (template, heun))
        assert own.timesteps == other.timesteps
        torch.testing.assert_close(own.alpha_bar, other.alpha_bar, atol=1e-6, rtol=0)
