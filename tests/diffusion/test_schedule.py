"""Noise schedules against closed forms and against diffusers' own."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from fpdm.diffusion import BETA_SCHEDULES, PREDICTION_TYPES, DiffusionLoss, make_schedule


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedules_are_diffusers_own(ours, theirs):
    wanted = DDPMScheduler(num_train_timesteps=1000, beta_schedule=theirs)
    assert torch.equal(make_schedule(beta_schedule=ours).betas, wanted.betas)


def test_linear_is_linear():
    # Ho et al. 2020, section 4: from 1e-4 to 0.02
    np.testing.assert_allclose(make_schedule().betas.numpy(), np.linspace(1e-4, 0.02, 1000), rtol=1e-5)


@pytest.mark.parametrize("timesteps", [20, 1000])
def test_cosine_is_the_squared_cosine(timesteps):
    # Nichol and Dhariwal 2021, eq. 17, but for the last timesteps, whose beta is capped
    alpha_bar = make_schedule(beta_schedule="cosine", num_train_timesteps=timesteps).alphas_cumprod.numpy()
    f = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(alpha_bar[:-1], (f[1:] / f[0])[:-1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("timesteps", [25, 100, 1000, 4000])
def test_linear_adds_the_same_noise_in_any_number_of_timesteps(timesteps):
    betas = make_schedule(num_train_timesteps=timesteps).betas
    assert len(betas) == timesteps
    assert betas.sum().item() == pytest.approx(1000 * (1e-4 + 0.02) / 2, rel=1e-4)
    assert betas.min() > 0
    assert betas.max() < 1


@pytest.mark.parametrize("timesteps", [2, 3, 10])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_few_timesteps_still_make_a_schedule(name, timesteps):
    betas = make_schedule(beta_schedule=name, num_train_timesteps=timesteps).betas
    assert betas.min() > 0
    assert betas.max() < 1


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr_ends_in_pure_noise_and_begins_as_before(name, prediction):
    plain = make_schedule(beta_schedule=name)
    zero = make_schedule(beta_schedule=name, prediction_type=prediction, zero_terminal_snr=True)
    assert plain.alphas_cumprod[-1] > 0
    assert DiffusionLoss(zero).alpha_bar[-1] == 0
    # Lin et al. 2024, algorithm 1: sqrt(alpha_bar) is shifted to end at 0 and scaled to begin where it did
    root = plain.alphas_cumprod.double().sqrt()
    wanted = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(DiffusionLoss(zero).alpha_bar.double(), wanted, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("settings", "config"), [
    ({},                                    {"variance_type": "learned_range", "clip_sample": False}),
    ({"learned_variance": False},           {"variance_type": "fixed_small"}),
    ({"clip_sample": True},                 {"clip_sample": True}),
    ({"prediction_type": "v_prediction"},   {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}),
    ({"num_train_timesteps": 100},          {"num_train_timesteps": 100, "timestep_spacing": "trailing"}),
])  # fmt: skip
def test_settings_reach_the_scheduler_that_is_saved(settings, config, tmp_path):
    make_schedule(**settings).save_pretrained(tmp_path)
    again = DDPMScheduler.from_pretrained(tmp_path)
    assert {name: again.config[name] for name in config} == config
    assert torch.equal(again.betas, make_schedule(**settings).betas)


@pytest.mark.parametrize(("settings", "said"), [
    ({"beta_schedule": "cosin"},                                            "'cosin'. Did you mean 'cosine'"),
    ({"beta_schedule": "squaredcos_cap_v2"},                                "Known: linear, cosine"),
    ({"prediction_type": "v"},                                              "'v'.*Known: epsilon"),
    ({"prediction_type": "v_predictoin"},                                   "Did you mean 'v_prediction'"),
    ({"zero_terminal_snr": True},                                           'not with "epsilon"'),
    ({"zero_terminal_snr": True, "prediction_type": "epsilon"},             'not with "epsilon"'),
    ({"num_train_timesteps": 1},                                            "num_train_timesteps is 1"),
    ({"num_train_timesteps": -5},                                           "num_train_timesteps is -5"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        make_schedule(**settings)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_every_prediction_type_is_made(prediction):
    assert make_schedule(prediction_type=prediction).config.prediction_type == prediction
