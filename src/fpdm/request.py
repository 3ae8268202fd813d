"""A call of the pipeline as an object: made of its arguments, checked, and not begun yet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpdm.arguments import asked_of_solves, check_latents, whole
from fpdm.fixedpoint import Solver
from fpdm.models import DiT
from fpdm.names import PLANNED, unknown
from fpdm.sampling import Guidance, Plan, Purse, Stepper, image_generators, original

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# What is done where a call leaves it open.
USUAL: dict[str, Any] = dict.fromkeys(("budget", *PLANNED))
USUAL |= {"allocation": "constant", "reuse": "plain", "solver": "picard"}


def settled(said: Mapping[str, Any], tuned: Mapping[str, Any] | None) -> dict[str, Any]:
    """The budget and all of a plan, by name: what a call says, or the tuned plan that it follows, and what is usual."""
    return {**USUAL, **({name: value for name, value in said.items() if value is not None} if tuned is None else tuned)}


@dataclass(frozen=True)
class Randomness:
    """Where the images' random numbers come from.

    given    one generator, which is reduced to a seed, or one per image; None for torch's own, or a seed
    seed     image i of a seed is the same in every batch
    indices  of the images; None for 0, 1, 2, ...
    count    of the images

    Raises ValueError for what does not fit together.
    """

    given: torch.Generator | Sequence[torch.Generator] | None
    seed: int | None
    indices: Sequence[int] | None
    count: int

    def __post_init__(self) -> None:
        given, indices = self.given, self.indices
        if self.count < 1:
            raise ValueError(f"there are {self.count} images to draw; it must be at least 1")
        if given is not None and self.seed is not None:
            raise ValueError("give a generator or a seed, not both")
        if given is not None and indices is not None:
            raise ValueError("image_indices go with a seed: leave the generator out")
        if given is not None and not isinstance(given, torch.Generator):
            if not isinstance(given, Sequence) or not all(isinstance(one, torch.Generator) for one in given):
                raise ValueError(f"generator is {given!r}; it must be a torch.Generator, or a list with one per image")
            if other := next((one for one in given if one.device.type != "cpu"), None):
                raise ValueError(f"a generator is of {other.device}; those of single images must be of the CPU")
            if len(given) != self.count:
                raise ValueError(f"{len(given)} generators for {self.count} images: give one, or one per image")
        if indices is not None and not isinstance(indices, Sequence):
            raise ValueError(f"image_indices is {indices!r}; it must be a list with one number per image")
        if indices is not None and len(indices) != self.count:
            raise ValueError(f"{len(indices)} image_indices for {self.count} images: give one per image")
        for index in indices or ():
            whole("image_indices", index)
        if self.seed is not None:
            whole("seed", self.seed)

    def generators(self) -> list[torch.Generator]:
        """One for each image. Draws from the one that was given, or from torch's own where there is no seed."""
        if self.given is not None and not isinstance(self.given, torch.Generator):
            return list(self.given)
        seed = self.seed
        if seed is None:
            device = "cpu" if self.given is None else self.given.device
            seed = int(torch.randint(2**62, (1,), generator=self.given, device=device))
        return image_generators(whole("seed", seed), range(self.count) if self.indices is None else self.indices)


@dataclass(frozen=True)
class Request:
    """A call of the pipeline, checked: see its arguments. Nothing random was drawn for it yet.

    tuned       whether the plan, its scheduler, reuse and solver are those of a tuned plan
    labels      (B,) int64, or None
    handed      what callbacks are handed, by name
    """

    plan: Plan
    tuned: bool
    labels: Tensor | None
    randomness: Randomness
    scheduler: str | None
    solver: Solver
    reuse: str
    tolerance: float | None
    pooled: bool
    guidance: Guidance
    latents: Tensor | None
    output_type: str
    return_dict: bool
    on_step_end: Callable[..., Any] | None
    handed: Sequence[str]

    def check(self, pipe: Any) -> None:
        """Raises ValueError for what the pipeline cannot do."""
        config, guidance, labels, count = pipe.transformer.config, self.guidance, self.labels, self.randomness.count
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(unknown("output_type", self.output_type, OUTPUT_TYPES))
        if pipe.vae is None and config.in_channels not in (1, 3) and self.output_type == "pil":
            raise ValueError(
                f"this network draws latents of {config.in_channels} channels, and the pipeline has no vae: give it "
                'one, or ask for output_type "latent"'
            )
        if extra := set(self.handed) - set(pipe._callback_tensor_inputs):
            raise ValueError(f"callbacks can be handed {pipe._callback_tensor_inputs}, not {sorted(extra)}")
        if (guidance.channels or 0) > config.in_channels:
            raise ValueError(f"guidance_channels is {guidance.channels}; there are {config.in_channels} channels")
        if pipe.config.only_classes and (labels is None or guidance.scale != 1):
            raise ValueError(
                "this model was trained with classes alone (--class-dropout 0), never without: "
                + ("give class_labels" if labels is None else "there is nothing to guide away from")
            )
        if guidance.scale != 1.0 and labels is None:
            why = "this model is unconditional" if config.num_classes == 0 else "no class_labels are given"
            raise ValueError(f"{why}: there is nothing to guide towards. Leave guidance_scale at 1")
        solving = asked_of_solves(self.reuse, self.solver, self.tolerance, self.pooled)
        solving += ["guidance_share"] if guidance.share != 1 else []
        if isinstance(original(pipe.transformer), DiT) and solving:
            raise ValueError(f"an explicit DiT has no fixed point to solve: leave {', '.join(sorted(solving))} out")
        guidance.check(Stepper(pipe.scheduler, self.scheduler, self.plan.num_steps, config.learned_variance).timesteps)
        Purse(count, self.tolerance, self.pooled)  # which refuses what cannot be
        needed = (count, config.in_channels, config.sample_size, config.sample_size)
        if self.latents is not None:
            check_latents(self.latents, needed)
