"""Losses against closed forms, numerical integration and other libraries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence

from fpdm.diffusion import PREDICTION_TYPES, DiffusionLoss, add_noise, make_schedule, predicted_x0, target
from fpdm.diffusion.losses import discretized_log_likelihood, normal_kl
from fpdm.keyed import generator

T = torch.tensor([0, 1, 500, 999])


def drawn(name, channels=2, scale=1.0):
    return torch.randn(len(T), channels, 3, 3, generator=generator(name)) * scale


def images():
    return drawn("x0", scale=0.4).clamp(-1, 1)


def loss_of(kind="epsilon", learned_variance=False, min_snr_gamma=None, **settings):
    schedule = make_schedule(prediction_type=kind, learned_variance=learned_variance, **settings)
    return DiffusionLoss(schedule, min_snr_gamma)


def column(vector):
    return vector.view(-1, 1, 1, 1)


def alpha_bars(timesteps=1000):
    """Of the linear schedule, in float64, independently."""
    return torch.from_numpy(np.cumprod(1 - np.linspace(0.1 / timesteps, 20 / timesteps, timesteps)))


def posterior(x0, x_t, t, timesteps=1000):
    """Mean and variance of q(x_{t-1} | x_t, x0) for t > 0, as a product of two Gaussians; float64."""
    bars = alpha_bars(timesteps)
    bar, before = (column(b) for b in (bars[t], bars[t - 1]))
    alpha = bar / before
    precision = 1 / (1 - before) + alpha / (1 - alpha)  # of the prior and of the likelihood
    mean = (before.sqrt() * x0 / (1 - before) + alpha.sqrt() * x_t / (1 - alpha)) / precision
    return mean, 1 / precision


# --- targets


WANTED = {
    "epsilon": lambda x0, noise, bar: noise,
    "sample": lambda x0, noise, bar: x0,
    "v_prediction": lambda x0, noise, bar: bar.sqrt() * noise - (1 - bar).sqrt() * x0,
}


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_mean_squared_error_is_measured_per_image_on_the_target(kind):
    loss, x0, noise, output = loss_of(kind), images(), drawn("noise"), drawn("output")
    found = loss(output, x0, noise, T)
    wanted = WANTED[kind](x0, noise, column(alpha_bars()[T])).double()
    torch.testing.assert_close(found.mse.double(), (output - wanted).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.total, found.mse)
    assert not found.vlb.any()
    assert found.total.dtype == torch.float32


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@settings(deadline=None)
@given(x0=st.floats(-1, 1), noise=st.floats(-4, 4), bar=st.floats(1e-3, 1 - 1e-3))
def test_the_image_follows_from_the_target(kind, x0, noise, bar):
    x0, noise, bar = (torch.tensor([value], dtype=torch.float64) for value in (x0, noise, bar))
    x_t = add_noise(x0, noise, bar)
    torch.testing.assert_close(predicted_x0(kind, target(kind, x0, noise, bar), x_t, bar), x0, atol=1e-9, rtol=0)


def test_noise_is_added_to_keep_the_variance():
    loss, x0, noise = loss_of(), images(), drawn("noise")
    bar = column(alpha_bars()[T])
    wanted = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    torch.testing.assert_close(loss.noisy(x0, noise, T).double(), wanted, atol=1e-5, rtol=0)
    assert torch.equal(loss.noisy(x0, noise, T), add_noise(x0, noise, column(loss.alpha_bar[T])))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_an_unknown_prediction_type_is_not_taken_for_v(kind):
    x = torch.zeros(1, 1, 1, 1)
    for function in (target, predicted_x0):
        with pytest.raises(ValueError, match=f"{kind}s.*Did you mean '{kind}'"):
            function(f"{kind}s", x, x, torch.tensor(0.5))


# --- the posterior and the variational bound


@pytest.mark.parametrize("t", [1, 2, 10, 500, 999])
@pytest.mark.parametrize(("x0", "x_t"), [(0.3, -1.2), (-1.0, 0.4), (0.0, 2.0)])
def test_the_posterior_is_what_bayes_says(t, x0, x_t):
    # The product of prior q(x_{t-1} | x0) and likelihood q(x_t | x_{t-1}), normalised on a grid
    bars = alpha_bars().numpy()
    alpha = bars[t] / bars[t - 1]
    grid = np.linspace(-6, 6, 200_001)
    density = norm.logpdf(grid, bars[t - 1] ** 0.5 * x0, (1 - bars[t - 1]) ** 0.5)
    density += norm.logpdf(x_t, alpha**0.5 * grid, (1 - alpha) ** 0.5)
    density = np.exp(density - density.max())
    density /= density.sum()
    mean = (density * grid).sum()
    variance = (density * (grid - mean) ** 2).sum()

    loss, at = loss_of(), torch.tensor([t])
    found = loss.posterior_mean(*(torch.full((1, 1, 1, 1), value) for value in (x0, x_t)), at)
    assert found.item() == pytest.approx(mean, abs=1e-4)
    assert loss.log_posterior_variance[t].exp().item() == pytest.approx(variance, rel=1e-3)


def test_where_the_posterior_has_no_variance_the_next_one_stands_in():
    loss = loss_of()
    assert loss.log_posterior_variance[0] == loss.log_posterior_variance[1]
    assert loss.posterior_x0[0].item() == pytest.approx(1)
    assert loss.posterior_xt[0].item() == 0


@settings(deadline=None)
@given(*[st.floats(-3, 3)] * 4)
def test_kl_is_that_of_torch(mean1, log_variance1, mean2, log_variance2):
    tensors = mean1, log_variance1, mean2, log_variance2 = [
        torch.tensor(value, dtype=torch.float64) for value in (mean1, log_variance1, mean2, log_variance2)
    ]
    wanted = kl_divergence(Normal(mean1, (log_variance1 / 2).exp()), Normal(mean2, (log_variance2 / 2).exp()))
    torch.testing.assert_close(normal_kl(*tensors), wanted, atol=1e-9, rtol=1e-9)


BINS = torch.linspace(-1, 1, 256, dtype=torch.float64)


@pytest.mark.parametrize("log_variance", [-9.0, -4.0, 0.0, 2.0])
@pytest.mark.parametrize("mean", [-1.5, -1.0, 0.0, 0.123, 0.9])
def test_the_probabilities_of_all_pixel_values_sum_to_one(mean, log_variance):
    log_p = discretized_log_likelihood(BINS, torch.full_like(BINS, mean), torch.full_like(BINS, log_variance))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("mean", "log_variance"), [(0.0, 0.0), (0.4, -3.0), (-0.9, -6.0), (1.3, -1.0)])
def test_the_probability_of_a_pixel_value_is_a_difference_of_two_cdfs(mean, log_variance):
    edges = (BINS[1:].numpy() + BINS[:-1].numpy()) / 2
    cdf = np.concatenate([[0], norm.cdf(edges, mean, math.exp(log_variance / 2)), [1]])
    log_p = discretized_log_likelihood(BINS, torch.full_like(BINS, mean), torch.full_like(BINS, log_variance))
    np.testing.assert_allclose(log_p.exp().numpy(), np.diff(cdf), atol=1e-10)


def test_an_impossible_pixel_value_has_a_finite_loss_and_gradient():
    x, mean = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([5.0, 5.0, -5.0], requires_grad=True)
    log_p = discretized_log_likelihood(x, mean, torch.full((3,), -9.0))
    log_p.sum().backward()
    assert log_p.isfinite().all()
    assert (log_p < -20).all()
    assert mean.grad.isfinite().all()


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_bound_is_the_kl_to_the_posterior_in_bits(kind):
    loss, x0, noise = loss_of(kind, learned_variance=True), images(), drawn("noise")
    # Predictions a little off the target, so that x0 from epsilon at the last timestep keeps a sensible size
    output = torch.cat([target(kind, x0, noise, column(loss.alpha_bar[T])) + drawn("error", scale=0.01), drawn("v")], 1)
    found = loss(output, x0, noise, T).vlb

    t = T[1:]
    x0, noise, v, bar = x0[1:].double(), noise[1:].double(), drawn("v")[1:].double(), column(alpha_bars()[t])
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    x0_hat = predicted_x0(kind, output[1:, :2].double(), x_t, bar)
    mean, variance = posterior(x0, x_t, t)
    mean_hat, _ = posterior(x0_hat, x_t, t)
    beta = column(1 - alpha_bars()[t] / alpha_bars()[t - 1])
    share = (v + 1) / 2  # eq. 15: between log beta (1) and the log of the posterior's variance (-1)
    deviation = (share * beta.log() + (1 - share) * variance.log()).exp().sqrt()
    kl = kl_divergence(Normal(mean, variance.sqrt()), Normal(mean_hat, deviation))
    torch.testing.assert_close(found[1:].double(), kl.mean((1, 2, 3)) / math.log(2), rtol=5e-3, atol=1e-5)


def test_the_bound_at_the_last_step_is_the_likelihood_of_the_pixels_in_bits():
    loss, noise = loss_of(learned_variance=True), drawn("noise")[:1]
    x0 = ((images()[:1] / 2 + 1) * 127.5).round() / 127.5 - 1  # the inner bins alone
    v = drawn("v")[:1]
    output = torch.cat([noise + 0.5, v], dim=1)
    found = loss(output, x0, noise, T[:1]).vlb

    betas = 1 - alpha_bars()[1] / alpha_bars()[0], 1 - alpha_bars()[0]
    smallest = betas[0] * (1 - alpha_bars()[0]) / (1 - alpha_bars()[1])  # the posterior's variance at t = 1
    share = (v.double() + 1) / 2
    deviation = (share * betas[1].log() + (1 - share) * smallest.log()).exp().sqrt().numpy()
    mean = (x0 - 0.5 * ((1 - alpha_bars()[0]) / alpha_bars()[0]).sqrt()).numpy()
    p = norm.cdf(x0 + 1 / 255, mean, deviation) - norm.cdf(x0 - 1 / 255, mean, deviation)
    assert found.item() == pytest.approx(-np.log2(p).mean(), rel=1e-3)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_exact_prediction_with_the_posterior_variance_has_no_kl(kind):
    loss, x0, noise = loss_of(kind, learned_variance=True), images(), drawn("noise")
    exact = target(kind, x0, noise, column(loss.alpha_bar[T]))
    found = loss(torch.cat([exact, torch.full_like(exact, -1)], dim=1), x0, noise, T)
    torch.testing.assert_close(found.vlb[1:], torch.zeros(3), atol=1e-5, rtol=0)
    assert not found.mse.any()
    other = loss(torch.cat([exact, torch.zeros_like(exact)], dim=1), x0, noise, T)
    assert other.vlb[1] > 0.01  # later the two bounds of the variance come together


@pytest.mark.parametrize("timesteps", [10, 100, 1000])
def test_the_bound_counts_in_proportion_to_the_number_of_timesteps(timesteps):
    loss, t = loss_of(learned_variance=True, num_train_timesteps=timesteps), torch.tensor([0, 1, 4, timesteps - 1])
    found = loss(drawn("output", 4), images(), drawn("noise"), t)
    assert (found.vlb > 0).all()
    torch.testing.assert_close(found.total, found.mse + timesteps / 1000 * found.vlb)


def test_the_bound_trains_the_variance_alone():
    output, x0, noise = drawn("output", 4).requires_grad_(), images(), drawn("noise")
    (hybrid,) = torch.autograd.grad(loss_of(learned_variance=True)(output, x0, noise, T).total.sum(), output)
    (plain,) = torch.autograd.grad(loss_of()(output[:, :2], x0, noise, T).total.sum(), output)
    assert torch.equal(hybrid[:, :2], plain[:, :2])
    assert hybrid[:, 2:].flatten(1).any(1).all()


@pytest.mark.parametrize("learned_variance", [True, False])
def test_the_parts_are_for_the_log_and_carry_no_gradient(learned_variance):
    output = drawn("output", 4 if learned_variance else 2).requires_grad_()
    found = loss_of(learned_variance=learned_variance)(output, images(), drawn("noise"), T)
    assert [part.requires_grad for part in (found.total, found.mse, found.vlb)] == [True, False, False]


@pytest.mark.parametrize("learned_variance", [True, False])
def test_an_image_does_not_depend_on_its_batch(learned_variance):
    loss, output = loss_of("v_prediction", learned_variance), drawn("output", 4 if learned_variance else 2)
    x0, noise = images(), drawn("noise")
    together = loss(output, x0, noise, T)
    for i in range(len(T)):
        alone = loss(output[i : i + 1], x0[i : i + 1], noise[i : i + 1], T[i : i + 1])
        torch.testing.assert_close(alone.total[0], together.total[i])


def test_a_loss_in_half_precision_is_computed_in_float32():
    output = drawn("output", 4).to(torch.bfloat16)
    loss, x0, noise = loss_of(learned_variance=True), images(), drawn("noise")
    torch.testing.assert_close(loss(output, x0, noise, T).total, loss(output.float(), x0, noise, T).total)


@pytest.mark.parametrize(("learned_variance", "channels"), [(False, 4), (True, 2), (True, 3)])
def test_an_output_with_the_wrong_channels_is_refused(learned_variance, channels):
    # Of two channels the first half is one, which would broadcast against both of the image, and train nonsense.
    with pytest.raises(ValueError, match="channels"):
        loss_of(learned_variance=learned_variance)(drawn("output", channels), images(), drawn("noise"), T)


def test_learned_variance_of_a_single_channel_does_not_pass_for_a_prediction():
    x0 = images()[:, :1]
    with pytest.raises(ValueError, match="channels"):
        loss_of(learned_variance=False)(drawn("output", 2), x0, torch.zeros_like(x0), T)


# --- weights


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize(("kind", "formula"), [
    ("epsilon",         lambda snr, gamma: min(snr, gamma) / snr),
    ("sample",          lambda snr, gamma: min(snr, gamma)),
    ("v_prediction",    lambda snr, gamma: min(snr, gamma) / (snr + 1)),
])  # fmt: skip
def test_min_snr_weights_are_the_formula(kind, formula, gamma):
    # Hang et al. 2023, section 3.4
    loss = loss_of(kind, min_snr_gamma=gamma)
    wanted = [formula(bar / (1 - bar), gamma) for bar in alpha_bars()[T].tolist()]
    np.testing.assert_allclose(loss.weight(T).numpy(), wanted, rtol=2e-3)
    output, x0, noise = drawn("output"), images(), drawn("noise")
    found = loss(output, x0, noise, T)
    torch.testing.assert_close(found.mse, loss_of(kind)(output, x0, noise, T).mse)  # not weighted
    torch.testing.assert_close(found.total, loss.weight(T) * found.mse)


def test_min_snr_weighs_the_same_error_in_x0_the_same_whatever_is_predicted():
    x0, noise, error, t = images(), drawn("noise"), drawn("error", scale=0.1), torch.tensor([10, 200, 500, 900])
    bar = column(loss_of().alpha_bar[t])
    x_t, wrong = add_noise(x0, noise, bar), x0 + error
    noise_of_wrong = (x_t - bar.sqrt() * wrong) / (1 - bar).sqrt()  # with which x_t becomes the wrong image
    totals = [
        loss_of(kind, min_snr_gamma=5.0)(target(kind, wrong, noise_of_wrong, bar), x0, noise, t).total
        for kind in PREDICTION_TYPES
    ]
    snr = (bar / (1 - bar)).flatten()
    wanted = snr.clamp(max=5) * error.square().mean((1, 2, 3))
    for total in totals:
        torch.testing.assert_close(total, wanted, rtol=1e-3, atol=1e-6)


def test_the_bound_is_not_weighted():
    output, x0, noise = drawn("output", 4), images(), drawn("noise")
    plain, weighted = (
        loss_of(learned_variance=True, min_snr_gamma=gamma)(output, x0, noise, T) for gamma in (None, 5.0)
    )
    assert torch.equal(plain.vlb, weighted.vlb)
    assert weighted.total[0] < plain.total[0]


def test_without_gamma_all_timesteps_weigh_one():
    assert loss_of().weight(T).tolist() == [1.0] * 4


@pytest.mark.parametrize("learned_variance", [True, False])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr_has_a_finite_loss_at_the_end(kind, learned_variance):
    loss = loss_of(kind, learned_variance, zero_terminal_snr=True)
    x0, noise, output = images(), drawn("noise"), drawn("output", 4 if learned_variance else 2).requires_grad_()
    assert loss.alpha_bar[-1] == 0
    assert torch.equal(loss.noisy(x0, noise, T)[-1], noise[-1])
    assert torch.equal(target("v_prediction", x0, noise, column(loss.alpha_bar[T]))[-1], -x0[-1])
    total = loss(output, x0, noise, T).total
    (gradient,) = torch.autograd.grad(total.sum(), output)
    assert total.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[-1].any()


@pytest.mark.parametrize(("settings", "said"), [
    ({"min_snr_gamma": 0},                                                              "min_snr_gamma is 0"),
    ({"min_snr_gamma": -1.0},                                                           "min_snr_gamma is -1.0"),
    ({"min_snr_gamma": math.nan},                                                       "min_snr_gamma is nan"),
    ({"min_snr_gamma": 5.0, "kind": "v_prediction", "zero_terminal_snr": True},         "weight 0"),
    ({"kind": "epsilon", "zero_terminal_snr": True},                                    "epsilon"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        loss_of(**settings)
