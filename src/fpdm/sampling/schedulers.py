"""diffusers' schedulers, made to fit: a template is read, never stepped; each sampling builds its own.

Every scheduler is handed x0, already clipped where the template clips, or what follows from it, instead of what the
network predicts. So clipping is the same for all of them, and all take every kind of prediction.
"""

from fractions import Fraction
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

from fpdm.diffusion import PREDICTION_TYPES, add_noise, predicted_x0
from fpdm.names import unknown
from fpdm.sampling.budget import check_calls

# By name, the kind of template that means the same.
KINDS: dict[str, Any] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
}
SCHEDULERS = tuple(KINDS)
UNSUPPORTED = ("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
               "use_flow_sigmas")  # fmt: skip
USABLE: dict[str, tuple[Any, ...]] = {"variance_type": (None, "fixed_small", "learned_range"), "predict_x0": (True,),
                                      "lower_order_final": (True,)}  # fmt: skip
LEAST_SIGNAL = 1e-6  # alpha_bar at the noisiest timestep, below which Heun's first step, in units of 1 / it, is no use


class Stepper:
    """One sampling's scheduler: `timesteps`, one per call of the network, and `step` from x_t to the next.

    template          a diffusers scheduler, read for its noise schedule, prediction type and clipping, and order
                      and kind of a DPM-Solver++; timesteps are always "trailing" and end at a clean image
    name              one of `SCHEDULERS`; None takes the template's own kind
    num_steps         calls of the network; their timesteps are spaced evenly from the noisiest ("trailing")
    learned_variance  whether the network's output has a second half; only DDPM has a use for it

    Raises ValueError for a scheduler that is none of these, or does not fit the noise schedule or number of calls.
    """

    def __init__(self, template: Any, name: str | None, num_steps: int, learned_variance: bool):
        self.name = name_of(template, name)
        self.kind = template.config.prediction_type
        self.clip = template.config.get("clip_sample_range", 1.0) if template.config.get("clip_sample", False) else None
        self.learned_variance = learned_variance
        settings = _settings(template)
        allowed = calls_of(template, self.name)
        check_calls(num_steps, allowed)
        distinct = num_steps if self.name != "heun" else num_steps // 2 + 1
        timesteps = trailing_timesteps(template.config.num_train_timesteps, distinct)
        self.scheduler = _build(self.name, template, learned_variance, settings)
        self.alpha_bar = _alpha_bar(template).float()
        # Heun's first step from noise without signal is one of first order, which takes one call.
        self.ahead = timesteps[:1] if self.name == "heun" and allowed.start == 2 else []
        _set_timesteps(self.scheduler, timesteps[len(self.ahead) :])
        self.timesteps = [*self.ahead, *(int(t) for t in self.scheduler.timesteps)]

    def level(self, index: int) -> float:
        """The noise level alpha_bar at which call number `index` is made."""
        return float(self.alpha_bar[self.timesteps[index]])

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
        if self.name == "heun":
            return self._heun(x0, x, index)
        if variance is not None and self.name == "ddpm":
            x0 = torch.cat([x0, variance], dim=1)
        draws = {} if self.name == "unipc" else {"generator": generators}  # it draws nothing, and knows of none
        return self.scheduler.step(x0, t, x, return_dict=False, **draws)[0]

    def replaced(self, x: Tensor, by: Tensor) -> Tensor:
        """`by`, to go on with in place of the `x` of the last step. UniPC's corrector and Heun's second stage start
        once more from what was before that, which would undo the change."""
        if torch.equal(x, by):
            return by
        if self.name == "unipc":
            self.scheduler.last_sample = None  # as at the first step: the next one does without the corrector
        if self.name == "heun" and not self.scheduler.state_in_first_order:
            scale = (1 + self.scheduler.sigmas[self.scheduler.step_index] ** 2).sqrt()
            self.scheduler.sample, self.scheduler.dt = by * scale, 0.0  # this step is of first order
        return by

    def _heun(self, x0: Tensor, x: Tensor, index: int) -> Tensor:
        """diffusers' Heun keeps x / sqrt(alpha_bar), and takes the noise that x0 tells of."""
        if index < len(self.ahead):
            here, following = (self.alpha_bar[t] for t in self.timesteps[:2])
            noise = (x - here.sqrt() * x0) / (1 - here).sqrt()
            return add_noise(x0, noise, following)  # DDIM's step
        index -= len(self.ahead)
        sigmas = self.scheduler.sigmas
        here, following = ((1 + sigmas[i] ** 2).sqrt() for i in (index, index + 1))
        scaled = x * here
        noise = (scaled - x0) / sigmas[index]
        return self.scheduler.step(noise, self.scheduler.timesteps[index], scaled, return_dict=False)[0] / following


def name_of(template: Any, name: str | None) -> str:
    """The name of the scheduler that is meant. Raises ValueError if it is none that is supported."""
    if name is not None and not isinstance(name, str):
        raise ValueError(
            f"scheduler is {type(name).__name__}; it must be a name: {', '.join(KINDS)}. For settings of its own, give "
            "the pipeline one: pipe.scheduler = CLASS.from_config(pipe.scheduler.config, ...)"
        )
    if name is not None and name not in KINDS:
        raise ValueError(unknown("scheduler", name, KINDS))
    own = next((own for own, kind in KINDS.items() if isinstance(template, kind)), None)
    if own is None:
        kinds = ", ".join(kind.__name__ for kind in KINDS.values())
        raise ValueError(
            f"{type(template).__name__} is not supported; those that are: {kinds}, or by name {', '.join(KINDS)}"
        )
    return name or own


def trailing_timesteps(num_train_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` timesteps, falling, evenly spaced, the first the noisiest (Lin et al. 2024, table 2, "trailing").

    In exact arithmetic: diffusers' floating point spacing has one too many for some numbers of steps.
    """
    spacing = Fraction(num_train_timesteps, num_steps)
    return [round(num_train_timesteps - i * spacing) - 1 for i in range(num_steps)]


def calls_of(template: Any, name: str | None) -> range:
    """The numbers of calls of the network that a sampling may make: a call is what a plan counts as a timestep.

    Heun's method makes two calls a step, but for the last step; and but for the first where that starts at noise
    without any signal (a "cosine" schedule, or zero terminal SNR), from which a step of its would be of no use.
    """
    most = template.config.num_train_timesteps
    if name_of(template, name) != "heun":
        return range(1, most + 1)
    return range(2, 2 * most - 1, 2) if _alpha_bar(template)[-1] < LEAST_SIGNAL else range(1, 2 * most, 2)


def _betas(template: Any) -> Tensor:
    """(T,) of a template. diffusers' Heun does not rescale its own for a zero terminal SNR that its config asks for."""
    rescaled = isinstance(template, HeunDiscreteScheduler) and template.config.get("rescale_betas_zero_snr")
    return rescale_zero_terminal_snr(template.betas) if rescaled else template.betas  # type: ignore[no-any-return]


def _alpha_bar(template: Any) -> Tensor:
    """(T,) float64, unclamped: diffusers' solvers put 2**-24 where a zero terminal SNR has 0."""
    betas = _betas(template).double()
    return (1 - betas).cumprod(0)


def _settings(template: Any) -> dict[str, Any]:
    """What all schedulers are built with. Raises ValueError for a template that sets what no scheduler here knows."""
    config = template.config
    if bad := [option for option in UNSUPPORTED if config.get(option, False)]:
        raise ValueError(f"the scheduler sets {', '.join(bad)}, which is not supported here: leave it off")
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(unknown("prediction type", config.prediction_type, PREDICTION_TYPES))
    zero_snr = config.get("rescale_betas_zero_snr", False)  # Heun knows no such thing
    if zero_snr and config.prediction_type == "epsilon":
        raise ValueError('zero terminal SNR goes with prediction_type "v_prediction" or "sample", not with "epsilon"')
    return {
        "num_train_timesteps": config.num_train_timesteps,
        "trained_betas": _betas(template).tolist(),  # not every scheduler knows every schedule
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": zero_snr,  # once more does no harm, and the multistep solvers must know
    }


def _build(name: str, template: Any, learned_variance: bool, settings: dict[str, Any]) -> Any:
    config = template.config
    for option, usable in USABLE.items():
        if (value := config.get(option, usable[0])) not in usable:
            allowed = " and ".join(map(repr, usable))
            raise ValueError(f"the scheduler's {option} is {value!r}; those that are supported here: {allowed}")
    if name == "ddpm":
        variance = "learned_range" if learned_variance else "fixed_small"
        return DDPMScheduler(variance_type=variance, clip_sample=False, **settings)
    if name in ("ddim", "euler"):
        # The first-order DPM-Solver is DDIM (Lu et al. 2022, sec. 4.1); so is Euler's method for x / sqrt(alpha_bar).
        # diffusers' own DDIM steps to t - 1000 // T, which is not the next timestep where T does not divide 1000; its
        # Euler loses digits where alpha_bar is small.
        return DPMSolverMultistepScheduler(solver_order=1, **settings)
    if name == "unipc":
        if isinstance(template, UniPCMultistepScheduler):
            settings |= {key: config[key] for key in ("solver_order", "solver_type", "disable_corrector")}
        return UniPCMultistepScheduler(**settings)
    if name == "heun":
        del settings["rescale_betas_zero_snr"]
        return HeunDiscreteScheduler(**{**settings, "prediction_type": "epsilon"})
    if isinstance(template, DPMSolverMultistepScheduler):
        if "++" not in config.algorithm_type:
            raise ValueError(f'algorithm_type {config.algorithm_type!r} is not supported: take "dpmsolver++"')
        settings |= {key: config[key] for key in ("solver_order", "algorithm_type", "solver_type")}
    return DPMSolverMultistepScheduler(**settings)


def _set_timesteps(scheduler: Any, timesteps: list[int]) -> None:
    if not isinstance(scheduler, UniPCMultistepScheduler):
        scheduler.set_timesteps(timesteps=timesteps)
        return
    scheduler.set_timesteps(len(timesteps))  # which takes no list, and may count wrongly
    table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    scheduler.sigmas = torch.cat([table[torch.from_numpy(np.array(timesteps))], torch.zeros(1)]).float()
    scheduler.timesteps = torch.tensor(timesteps)
    scheduler.num_inference_steps = len(timesteps)
