"""The training loss: squared error on the prediction, plus the variational bound where the variance is learned.

    hybrid loss = |prediction - target|^2 + (T / 1000) L_vlb       (Nichol and Dhariwal 2021, eq. 16)
    L_vlb       = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 0, -log p(x0 | x_1) for t = 0, in bits per value

Their 0.001 multiplies a sum over T timesteps; one timestep is drawn here, hence T / 1000. The mean that enters L_vlb is
detached: the bound trains the variance alone.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from fpdm.diffusion.predictions import add_noise, predicted_x0, target


@dataclass(frozen=True)
class Loss:
    """Per image, (B,) float32: `total` is minimised, `mse` is unweighted, `vlb` is 0 without learned variance."""

    total: Tensor
    mse: Tensor
    vlb: Tensor


class DiffusionLoss:
    """The loss of a noise schedule.

    scheduler      the schedule, the prediction type and whether the variance is learned ("learned_range")
    min_snr_gamma  clamps the weights of easy timesteps (Hang et al. 2023; 5 in the paper); None weights all alike

    Raises ValueError for a gamma that is not positive, or together with a zero terminal SNR, where it would give the
    last timestep, the one that sampling begins at, the weight 0.
    """

    def __init__(self, scheduler: DDPMScheduler, min_snr_gamma: float | None = None):
        self.kind: str = scheduler.config.prediction_type
        self.learned_variance = scheduler.config.variance_type == "learned_range"
        self.min_snr_gamma = min_snr_gamma
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma is {min_snr_gamma}; it must be above 0 (5 in the paper)")
        if min_snr_gamma is not None and scheduler.config.rescale_betas_zero_snr:
            raise ValueError(
                "min-SNR weighting gives the last timestep weight 0 where its SNR is 0: use one of the two"
            )

        betas = scheduler.betas.double()
        alpha_bar = (1 - betas).cumprod(0)
        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        variance = betas * (1 - previous) / (1 - alpha_bar)
        self.alpha_bar = alpha_bar.float()
        # q(x_{t-1} | x_t, x0), eq. 6 and 7 of Ho et al. 2020. Its variance is 0 at t = 0, so the next one stands in.
        self.posterior_x0 = (betas * previous.sqrt() / (1 - alpha_bar)).float()
        self.posterior_xt = ((1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar)).float()
        self.log_posterior_variance = torch.cat([variance[1:2], variance[1:]]).log().float()
        self.log_betas = betas.log().float()

    def to(self, device: torch.device) -> "DiffusionLoss":
        """Move the tables to where the images are, so that no step waits for them."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha_bar)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, H, W) at timesteps `t` (B,) int64."""
        return add_noise(x0, noise, _at(self.alpha_bar, t))

    def noisier(self, x_t: Tensor, t: Tensor, later: Tensor, fresh: Tensor) -> Tensor:
        """x (B, C, H, W) at timesteps `later` (B,), not before `t` (B,), from x_t by adding `fresh` noise: a draw of
        q(x_later | x_t), as sampling goes through them the other way."""
        same = (later == t).view(-1, 1, 1, 1)  # of zero terminal SNR the last ratio would be 0 / 0
        ratio = torch.where(same, 1.0, _at(self.alpha_bar, later) / _at(self.alpha_bar, t))
        return add_noise(x_t, fresh, ratio)

    def __call__(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, teacher: Tensor | None = None) -> Loss:
        """The loss of a network's `output` (B, C or 2C, H, W) at x_t = noisy(x0, noise, t).

        `teacher`, another output for the same x_t, takes the place of the prediction's target; it gets no gradient.
        """
        channels = x0.shape[1] * (2 if self.learned_variance else 1)
        if output.shape[1] != channels:  # one channel would broadcast against many
            raise ValueError(
                f"the output has {output.shape[1]} channels, not {channels}: images of {x0.shape[1]}, "
                f"{'with' if self.learned_variance else 'without'} learned variance"
            )
        prediction, variance = output.chunk(2, dim=1) if self.learned_variance else (output, None)
        wanted = target(self.kind, x0, noise, _at(self.alpha_bar, t))
        if teacher is not None:
            wanted = teacher[:, : x0.shape[1]].detach().float()
        mse = (prediction.float() - wanted).square().flatten(1).mean(1)
        vlb = torch.zeros_like(mse)
        if variance is not None:
            vlb = self.bound(prediction.float().detach(), variance.float(), x0, self.noisy(x0, noise, t), t)
        return Loss(self.weight(t) * mse + self.num_timesteps / 1000 * vlb, mse.detach(), vlb.detach())

    def weight(self, t: Tensor) -> Tensor:
        """The min-SNR weight (B,) of timesteps `t`, for the loss as the prediction type measures it."""
        if self.min_snr_gamma is None:
            return torch.ones(len(t), device=t.device)
        alpha_bar = self.alpha_bar.to(t.device)[t]
        snr = alpha_bar / (1 - alpha_bar)
        clamped = snr.clamp_max(self.min_snr_gamma)
        return {"sample": clamped, "epsilon": clamped / snr, "v_prediction": clamped / (snr + 1)}[self.kind]

    def bound(self, prediction: Tensor, variance: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """L_vlb (B,) in bits per value; `variance` interpolates between the bounds of the log variance at -1 and 1."""
        low, high = _at(self.log_posterior_variance, t), _at(self.log_betas, t)
        log_variance = torch.lerp(low, high, (variance + 1) / 2)
        x0_hat = predicted_x0(self.kind, prediction, x_t, _at(self.alpha_bar, t))
        mean = self.posterior_mean(x0_hat, x_t, t)
        kl = normal_kl(self.posterior_mean(x0, x_t, t), low, mean, log_variance)
        nll = -discretized_log_likelihood(x0, mean, log_variance)
        return torch.where(_column(t == 0, kl), nll, kl).flatten(1).mean(1) / math.log(2)

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7)."""
        return _at(self.posterior_x0, t) * x0 + _at(self.posterior_xt, t) * x_t


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of one-dimensional Gaussians, elementwise, in nats."""
    ratio = (log_variance1 - log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 + ratio - 1 + (mean1 - mean2).square() * (-log_variance2).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log probability, in nats, of the bin of `x` among 256 with centres in [-1, 1] (Ho et al. 2020, eq. 13).

    The outer bins reach to infinity. Applied to latents too, as DiT does, where it only sets a scale.
    """
    inverse = (-0.5 * log_variance).exp()
    above, below = (x - mean + 1 / 255) * inverse, (x - mean - 1 / 255) * inverse
    # Not log_ndtr, which MPS lacks; clamped alike everywhere, so that no bin has an infinite loss.
    inside = torch.special.ndtr(above) - torch.special.ndtr(below)
    inside = torch.where(x < -0.999, torch.special.ndtr(above), inside)
    return torch.where(x > 0.999, torch.special.ndtr(-below), inside).clamp_min(1e-12).log()


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 1))


def _at(table: Tensor, t: Tensor) -> Tensor:
    """`table` (T,) at timesteps `t` (B,), as (B, 1, 1, 1)."""
    return table.to(t.device)[t].view(-1, 1, 1, 1)
