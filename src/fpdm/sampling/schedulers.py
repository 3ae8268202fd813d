"""diffusers' schedulers, made to fit: a template is read, never stepped; each sampling builds its own.

Every scheduler is handed x0, already clipped where the template clips, instead of what the network predicts. So
clipping is the same for all of them, and one scheduler cannot misread a prediction that another reads rightly.
"""

from fractions import Fraction
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from fpdm.diffusion import PREDICTION_TYPES, predicted_x0
from fpdm.names import unknown

SCHEDULERS = ("ddpm", "ddim", "dpm++")
UNSUPPORTED = ("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
               "use_flow_sigmas")  # fmt: skip


class Stepper:
    """One sampling's scheduler: `timesteps`, and `step` from x_t to the next.

    template          a diffusers scheduler, read for its noise schedule, prediction type and clipping, and order
                      and kind of a DPM-Solver++; timesteps are always "trailing" and end at a clean image
    name              "ddpm", "ddim" or "dpm++" (second-order multistep); None takes the template's own kind
    num_steps         timesteps, spaced evenly from the noisiest ("trailing")
    learned_variance  whether the network's output has a second half; only DDPM has a use for it

    Raises ValueError for a scheduler that is none of these.
    """

    def __init__(self, template: Any, name: str | None, num_steps: int, learned_variance: bool):
        self.scheduler = _build(template, name, learned_variance)
        self.kind = template.config.prediction_type
        self.clip = template.config.get("clip_sample_range", 1.0) if template.config.get("clip_sample", False) else None
        self.learned_variance = learned_variance
        self.timesteps = trailing_timesteps(template.config.num_train_timesteps, num_steps)
        self.scheduler.set_timesteps(timesteps=self.timesteps)
        # The unclamped table: diffusers' solvers put 2**-24 where a zero terminal SNR has 0.
        self.alpha_bar = (1 - self.scheduler.betas.double()).cumprod(0).float()

    def step(self, output: Tensor, index: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The next x (B, C, H, W) from `x` and the network's `output` (B, C or 2C, H, W) at timestep number `index`.

        All float32. Every random draw comes from `generators`, one per image.
        """
        prediction, variance = output.chunk(2, dim=1) if self.learned_variance else (output, None)
        t = self.timesteps[index]
        x0 = predicted_x0(self.kind, prediction, x, self.alpha_bar[t])
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        if index == len(self.timesteps) - 1:
            return x0  # the mean of the last step; diffusers' DDPM would add noise to it unless t is exactly 0
        if variance is not None and isinstance(self.scheduler, DDPMScheduler):
            x0 = torch.cat([x0, variance], dim=1)
        return self.scheduler.step(x0, t, x, generator=generators, return_dict=False)[0]


def trailing_timesteps(num_train_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` timesteps, falling, evenly spaced, the first the noisiest (Lin et al. 2024, table 2, "trailing").

    In exact arithmetic: diffusers' floating point spacing has one too many for some numbers of steps.
    """
    spacing = Fraction(num_train_timesteps, num_steps)
    return [round(num_train_timesteps - i * spacing) - 1 for i in range(num_steps)]


def _build(template: Any, name: str | None, learned_variance: bool) -> Any:
    config = template.config
    if bad := [option for option in UNSUPPORTED if config.get(option, False)]:
        raise ValueError(f"the scheduler sets {', '.join(bad)}, which is not supported here: leave it off")
    if name is not None and name not in SCHEDULERS:
        raise ValueError(unknown("scheduler", name, SCHEDULERS))
    if not isinstance(template, DDPMScheduler | DDIMScheduler | DPMSolverMultistepScheduler):
        raise ValueError(
            f"{type(template).__name__} is not supported; those that are: DDPMScheduler, DDIMScheduler, "
            f"DPMSolverMultistepScheduler, or by name {', '.join(SCHEDULERS)}"
        )
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(unknown("prediction type", config.prediction_type, PREDICTION_TYPES))
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise ValueError('zero terminal SNR goes with prediction_type "v_prediction" or "sample", not with "epsilon"')
    settings = {
        "num_train_timesteps": config.num_train_timesteps,
        "trained_betas": template.betas.tolist(),  # whatever they came from: not every scheduler knows every schedule
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,  # once more does no harm, and DPM-Solver++ must know
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
    }
    if name == "ddpm" or (name is None and isinstance(template, DDPMScheduler)):
        variance = "learned_range" if learned_variance else "fixed_small"
        return DDPMScheduler(variance_type=variance, clip_sample=False, **settings)
    if name == "ddim" or (name is None and isinstance(template, DDIMScheduler)):
        # The first-order DPM-Solver is DDIM (Lu et al. 2022, sec. 4.1). diffusers' own DDIM steps to t - 1000 // T,
        # which is not the next timestep where T does not divide 1000.
        return DPMSolverMultistepScheduler(solver_order=1, **settings)
    if name is None:
        if "++" not in config.algorithm_type:
            raise ValueError(f'algorithm_type {config.algorithm_type!r} is not supported: take "dpmsolver++"')
        settings |= {key: config[key] for key in ("solver_order", "algorithm_type", "solver_type")}
    return DPMSolverMultistepScheduler(**settings)
