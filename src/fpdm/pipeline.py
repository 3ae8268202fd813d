"""FixedPointDiTPipeline: a trained model as a diffusers pipeline."""

import os
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging
from huggingface_hub import snapshot_download
from torch import Tensor

from fpdm.arguments import (
    NO_GUIDANCE,
    asked_of_solves,
    generators_of,
    guidance_of,
    labels_of,
    replacing,
    unmoved,
    whole,
)
from fpdm.files import model_folder
from fpdm.fixedpoint import Solver, Status
from fpdm.models import Output

# The folder's index names the modules of the classes: these imports and paths are part of the file format.
from fpdm.models.dit import DiT
from fpdm.models.fixed_point_dit import FixedPointDiT
from fpdm.names import unknown
from fpdm.sampling import (
    Call,
    Guidance,
    Plan,
    Purse,
    Report,
    Stepper,
    TunedPlan,
    answered,
    calls_of,
    check_reuse,
    continuous,
    cost_of,
    course,
    initial_noise,
    load_plans,
    make_plan,
    nearest_plan,
    original,
    save_plans,
    solver_of,
)

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class FixedPointDiTPipelineOutput(BaseOutput):
    """images: a list of PIL images, or an array (B, H, W, C) in [0, 1], or a tensor (B, C, H, W) in [0, 1] ("pt") or
    as sampled ("latent"). report: what was spent."""

    images: Any
    report: Report


class FixedPointDiTPipeline(DiffusionPipeline):
    """Draws images from a `FixedPointDiT`, or from an explicit `DiT` by the same code.

    transformer  the network
    scheduler    a diffusers scheduler of one of the kinds in `fpdm.sampling.SCHEDULERS`: a template, never stepped
    vae          an AutoencoderKL if the network works in its latents, else None
    class_names  one per class, so that classes can be asked for by name
    """

    tuned_plans: tuple[TunedPlan, ...] = ()
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: FixedPointDiT | DiT,
        scheduler: Any,
        vae: AutoencoderKL | None = None,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = list(class_names.values() if isinstance(class_names, Mapping) else class_names or [])
        if names and len(names) != transformer.config.num_classes:
            raise ValueError(f"there are {len(names)} class_names for {transformer.config.num_classes} classes")
        # As a mapping: diffusers takes lists in a folder's index for components.
        self.register_to_config(class_names={str(i): name for i, name in enumerate(names)} or None)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Open a pipeline folder, a run, a model inside the package, or a name on the hub. Options are diffusers';
        nothing is ever unpickled.

        A folder that is not there, or whose files are missing or damaged, raises OSError or ValueError.
        """
        path = model_folder(str(pretrained_model_name_or_path))
        if not Path(path).is_dir():  # diffusers downloads only what it has classes for, so the whole is fetched here
            options = ("cache_dir", "force_download", "local_files_only", "revision", "token")
            path = snapshot_download(
                str(path),
                allow_patterns=["*.json", "*.safetensors"],
                **{name: kwargs.pop(name) for name in options if name in kwargs},
            )
        pipe = super().from_pretrained(path, **{"use_safetensors": True, **kwargs})
        pipe.tuned_plans = load_plans(Path(path))
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """diffusers' `from_pipe`, with the tuned plans."""
        pipe: Self = super().from_pipe(pipeline, **kwargs)
        pipe.tuned_plans = getattr(pipeline, "tuned_plans", ())
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """diffusers' `save_pretrained`, and the tuned plans. Raises ValueError for a network in 8 bits."""
        self.transformer.check_savable()
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        save_plans(Path(save_directory), self.tuned_plans)  # first: what follows may upload the folder
        super().save_pretrained(save_directory, **kwargs)

    def tuned(self, budget: int, guidance_scale: float = 1.0) -> dict[str, Any]:
        """Keyword arguments of a call with the tuned plan nearest to a budget: `pipe(labels, **pipe.tuned(80))`.

        Raises ValueError for a model that was not tuned with this guidance.
        """
        plan = nearest_plan(self.tuned_plans, budget, guidance_scale)
        if plan is None:
            raise ValueError(
                f"this model has no plans tuned with guidance scale {guidance_scale:g}: make them with `fpdm tune`, or "
                "give a plan"
            )
        return plan.choices(budget, cost_of(self.transformer))

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of their numbers; none if they have no names."""
        return list((self.config.class_names or {}).values())

    def check_inputs(
        self,
        plan: Plan,
        labels: Tensor | None,
        scheduler: str | None = None,
        guidance: Guidance = NO_GUIDANCE,
        output_type: str = "pil",
        tensor_inputs: Sequence[str] = (),
        solving: Collection[str] = (),
    ) -> None:
        """Raises ValueError for what a call would refuse; `plan`, `labels` and `Guidance` check the rest. `solving`
        names what is asked of the solves of fixed points."""
        config = self.transformer.config
        if output_type not in OUTPUT_TYPES:
            raise ValueError(unknown("output_type", output_type, OUTPUT_TYPES))
        if extra := set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callbacks can be handed {self._callback_tensor_inputs}, not {sorted(extra)}")
        if (guidance.channels or 0) > config.in_channels:
            raise ValueError(f"guidance_channels is {guidance.channels}; there are {config.in_channels} channels")
        if guidance.scale != 1.0 and labels is None:
            why = "this model is unconditional" if config.num_classes == 0 else "no class_labels are given"
            raise ValueError(f"{why}: there is nothing to guide towards. Leave guidance_scale at 1")
        solving = [*solving, *(["guidance_share"] if guidance.share != 1 else [])]
        if isinstance(original(self.transformer), DiT) and solving:
            raise ValueError(f"an explicit DiT has no fixed point to solve: leave {', '.join(sorted(solving))} out")
        Stepper(self.scheduler, scheduler, plan.num_steps, config.learned_variance)

    def plan(self, *, scheduler: str | None = None, **choices: Any) -> Plan:
        """The plan that `make_plan` makes of these choices for this network and scheduler, before anything runs."""
        return make_plan(cost_of(self.transformer), calls=calls_of(self.scheduler, scheduler), **choices)

    def labels(self, classes: int | str | Sequence[int | str] | None, num_images: int | None) -> Tensor | None:
        """Class labels (B,) int64 from numbers and names, one class standing for all images; None for no classes.

        Raises ValueError for a class that the model does not have.
        """
        return labels_of(classes, num_images, self.transformer.config.num_classes, self.class_names)

    def drawing(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images: int | None = None,
        *,
        budget: int | None = None,
        num_inference_steps: int | None = None,
        iterations: int | Sequence[int] | None = None,
        allocation: str | Sequence[float] = "constant",
        reuse: str | bool = "plain",
        solver: str | Solver = "picard",
        tolerance: float | None = None,
        pooled: bool = False,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        guidance_share: float = 1.0,
        scheduler: str | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        image_indices: Sequence[int] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Generator[Call, Output, FixedPointDiTPipelineOutput]:
        """Draw images: `pipe(...)` with these arguments. (This function is the course of it, which `pipe(...)` runs by
        itself, and `continuous` beside others.)

        class_labels         a class per image, by number or name; None draws without a class
        num_images           how many images: 1 by default, or as many as there are labels
        budget               transformer block passes per image; with iterations and timesteps see `make_plan`
        num_inference_steps  timesteps, i.e. calls of the network
        iterations           of the fixed point at every timestep, or a list with one entry per timestep
        allocation           how iterations are shared out: "constant", "linear:0.5", ..., or a weight per timestep
        reuse                what a solve starts from: "none" for u, "plain" for the last timestep's solution, "linear"
                             or "quadratic" for what the last two or three foretell; True is "plain", False "none"
        solver               "picard", "anderson", "broyden", or a Solver
        tolerance            relative residual at which an image's solve stops; what it leaves over it may spend at its
                             later timesteps. None spends exactly what is planned
        pooled               whether what is left over is shared out over the batch; images then depend on their batch
        guidance_scale       1 for none; above it, the network is evaluated twice (not counted in the budget). 0 is no
                             "off" here: it draws without the class
        guidance_interval    the training timesteps (low, high) at which to guide; None for all
        guidance_channels    how many channels to guide; None for all. Published results of DiT guide 3 of 4
        guidance_share       iterations of the unconditional evaluation, as a share of the conditional one's
        scheduler            one of `fpdm.sampling.SCHEDULERS`; None uses the pipeline's own
        generator            one, which is reduced to a seed, or a list with one per image (CPU ones)
        seed, image_indices  image i of a seed is the same in every batch; indices default to 0, 1, 2, ...
        latents              noise (B, C, H, W) to start from instead
        callback_on_step_end called with (pipeline, index, timestep, {"latents": x}) after each timestep; may return
                             a dictionary with other latents
        return_dict          False returns the tuple (images, report)

        Raises ValueError for what cannot be done, before anything runs.
        """
        plan = self.plan(
            budget=budget,
            num_steps=num_inference_steps,
            iterations=iterations,
            allocation=allocation,
            scheduler=scheduler,
        )
        labels = self.labels(class_labels, num_images)
        guidance = guidance_of(guidance_scale, guidance_interval, guidance_channels, guidance_share)
        solver, reuse = solver_of(solver), check_reuse(reuse)
        solving = asked_of_solves(reuse, solver, tolerance, pooled)
        self.check_inputs(plan, labels, scheduler, guidance, output_type, callback_on_step_end_tensor_inputs, solving)
        count = (1 if num_images is None else num_images) if labels is None else len(labels)
        Purse(whole("num_images", count), tolerance, pooled)  # which refuses what cannot be
        generators = generators_of(generator, seed, image_indices, count)
        noise = self._noise(latents, generators)

        with self.progress_bar(total=plan.num_steps) as bar:

            def on_step(index: int, t: int, x: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                handed = {"latents": x} if "latents" in callback_on_step_end_tensor_inputs else {}
                returned = callback_on_step_end(self, index, t, handed) or {}
                if extra := set(returned) - {"latents"}:
                    raise ValueError(f"callback_on_step_end returned {sorted(extra)}; it can only replace 'latents'")
                return replacing(x, returned.get("latents"))

            x, report = yield from course(
                self.transformer,
                self.scheduler,
                plan,
                noise.to(self._execution_device),
                labels,
                generators,
                scheduler=scheduler,
                solver=solver,
                tolerance=tolerance,
                pooled=pooled,
                reuse=reuse,
                guidance=guidance,
                on_step=on_step,
            )
        if report.diverged:
            logger.warning(f"{report.diverged} of {count} images diverged: {Status.DIVERGED.message}")
        images = self.decode(x.nan_to_num(0, 0, 0) if report.diverged else x, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, report  # type: ignore[return-value]
        return FixedPointDiTPipelineOutput(images, report)

    __call__ = answered(drawing)

    def continuous(
        self, calls: Iterable[Mapping[str, Any]], batch_size: int = 64
    ) -> Iterator[tuple[int, FixedPointDiTPipelineOutput]]:
        """Draw many calls at once, each under a plan of its own: continuous batching.

        calls       the keyword arguments of each; an iterator is asked for the next one when there is room
        batch_size  evaluations of the network at a time; an image under guidance counts twice

        Yields the number of each call and what `pipe(**call)` would return, as they finish. Samples at different
        timesteps and iterations share every pass of the shared block, and leave room for others when they are solved:
        for many small calls that come one by one. Images of one plan are drawn faster by one call.
        Raises ValueError for what a call would refuse: before anything runs where `calls` is a list, else once those
        that are under way are finished. And for a solver other than Picard, an explicit network, and an offloaded one.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if hasattr(self.transformer, "_hf_hook"):
            raise ValueError("an offloaded network is called as a whole: draw its calls one after the other")
        if original(self.transformer) is not self.transformer:
            raise ValueError(
                "this network was compiled as a whole: have `compile_repeated_blocks()` compile its blocks"
            )
        bars = dict(getattr(self, "_progress_bar_config", {}))
        self.set_progress_bar_config(**{**bars, "disable": True})  # each call would show one
        try:
            for call in calls if isinstance(calls, Sequence) else ():
                with unmoved(call.get("generator")):
                    next(self.drawing(**call))
            yield from continuous((self.drawing(**call) for call in calls), batch_size)
        finally:
            self.set_progress_bar_config(**bars)

    def _noise(self, latents: Tensor | None, generators: Sequence[torch.Generator]) -> Tensor:
        noise = initial_noise(self.transformer, generators)
        if latents is not None and latents.shape != noise.shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; these images need {tuple(noise.shape)}")
        return noise if latents is None else latents

    @torch.no_grad()
    def decode(self, x: Tensor, output_type: str = "pil") -> Any:
        """Images of the type asked for from samples (B, C, H, W), through the VAE where there is one."""
        if output_type == "latent":
            return x
        if self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            x = self.vae.decode((x / self.vae.config.scaling_factor + shift).to(self.vae.dtype)).sample.float()
        return self.image_processor.postprocess(x, output_type=output_type)
