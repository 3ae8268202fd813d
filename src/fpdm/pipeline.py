"""FixedPointDiTPipeline: a trained model as a diffusers pipeline."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from operator import index
from pathlib import Path
from typing import Any, ParamSpec, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging
from huggingface_hub import snapshot_download
from torch import Tensor
from tqdm import tqdm

from fpdm.arguments import guidance_of, labels_of, named, replacing, whole
from fpdm.batching import check_parts, courses_of
from fpdm.files import model_folder
from fpdm.fixedpoint import Solver, Status
from fpdm.models import Output

# The folder's index names the modules of the classes: these imports and paths are part of the file format.
from fpdm.models.dit import DiT
from fpdm.models.fixed_point_dit import FixedPointDiT
from fpdm.request import Randomness, Request, settled
from fpdm.sampling import (
    Call,
    Plan,
    Report,
    TunedPlan,
    answered,
    calls_of,
    check_reuse,
    continuous,
    cost_of,
    course,
    initial_noise,
    listed,
    load_plans,
    make_plan,
    nearest_plan,
    original,
    plan_for,
    save_plans,
    solver_of,
)
from fpdm.weights import check_whole

logger = logging.get_logger(__name__)


@dataclass
class FixedPointDiTPipelineOutput(BaseOutput):
    """images: a list of PIL images, or an array (B, H, W, C) in [0, 1], or a tensor (B, C, H, W) in [0, 1] ("pt") or
    as sampled ("latent"). report: what was spent."""

    images: Any
    report: Report


def in_order(names: Mapping[str, str]) -> list[str]:
    """Names by their numbers, in the order of these. A folder's index has them in the order of text: 0, 1, 10, 2."""
    return [names[number] for number in sorted(names, key=int)]


Drawing = Generator[Call, Output, FixedPointDiTPipelineOutput]
P = ParamSpec("P")


def done(request: Callable[P, Request]) -> Callable[P, FixedPointDiTPipelineOutput]:
    """The method that draws what this one checks."""

    @wraps(request)
    def call(*args: P.args, **kwargs: P.kwargs) -> FixedPointDiTPipelineOutput:
        pipe: Any = args[0]
        return answered(pipe.drawing)(request(*args, **kwargs))  # type: ignore[no-any-return]

    return call


class FixedPointDiTPipeline(DiffusionPipeline):
    """Draws images from a `FixedPointDiT`, or from an explicit `DiT` by the same code.

    transformer   the network
    scheduler     a diffusers scheduler of one of the kinds in `fpdm.sampling.SCHEDULERS`: a template, never stepped
    vae           an AutoencoderKL if the network works in its latents, else None
    class_names   one per class, so that classes can be asked for by name
    only_classes  whether the network was never trained without a class (`fpdm train --class-dropout 0`): it then draws
                  nothing without one, and has nothing to be guided away from
    """

    _tuned_plans: tuple[TunedPlan, ...] = ()
    _tuned_with: tuple[Any, Any] = (None, None)
    _interrupt = False  # as in diffusers, set by a callback or another thread: what there is by then is returned
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: FixedPointDiT | DiT,
        scheduler: Any,
        vae: AutoencoderKL | None = None,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
        only_classes: bool = False,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = in_order(class_names) if isinstance(class_names, Mapping) else list(class_names or [])
        # Any of diffusers' pipelines can be opened with a component left out.
        if names and transformer is not None and len(names) != transformer.config.num_classes:
            raise ValueError(f"there are {len(names)} class_names for {transformer.config.num_classes} classes")
        # As a mapping: diffusers takes lists in a folder's index for components.
        numbered = {str(i): name for i, name in enumerate(names)} or None
        self.register_to_config(class_names=numbered, only_classes=only_classes)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Open a pipeline folder, a run, a model inside the package, or a name on the hub. Options are diffusers';
        nothing is ever unpickled. The tuned plans come along, unless another transformer or scheduler is given.

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
        if isinstance(pipe.vae, torch.nn.Module):
            check_whole(pipe.vae, f"the autoencoder in {path} is not whole")
        if not {"transformer", "scheduler"} & set(kwargs):  # else they are of other parts
            pipe.tuned_plans = load_plans(Path(path))
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """diffusers' `from_pipe`, with the tuned plans."""
        pipe: Self = super().from_pipe(pipeline, **kwargs)
        if (pipe.transformer, pipe.scheduler) == (pipeline.transformer, pipeline.scheduler):
            pipe.tuned_plans = getattr(pipeline, "_own_plans", ())
        return pipe

    @property
    def tuned_plans(self) -> tuple[TunedPlan, ...]:
        """What `fpdm tune` found for the network. A pipeline that was given another network or scheduler since then
        does not take them by itself."""
        return self._tuned_plans

    @tuned_plans.setter
    def tuned_plans(self, plans: Sequence[TunedPlan]) -> None:
        self._tuned_plans = tuple(plans)
        self._tuned_with = original(self.transformer), self.scheduler

    @property
    def _own_plans(self) -> tuple[TunedPlan, ...]:
        """The tuned plans, if they are of the network and scheduler that are there."""
        return self._tuned_plans if self._tuned_with == (original(self.transformer), self.scheduler) else ()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """diffusers' `save_pretrained`, and the tuned plans, unless they are of another network or scheduler. Raises
        ValueError for a network in 8 bits, or none."""
        if self.transformer is None:
            raise ValueError("this pipeline has no transformer: it was opened without one")
        self.transformer.check_savable()
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        save_plans(Path(save_directory), self._own_plans)  # first: what follows may upload the folder
        super().save_pretrained(save_directory, **kwargs)

    @named
    def tuned(self, budget: int, guidance_scale: float = 1.0) -> dict[str, Any]:
        """Keyword arguments of a call with the tuned plan nearest to a budget: `pipe(labels, **pipe.tuned(80))`.

        Raises ValueError for a model that was not tuned with this guidance, and a budget that cannot be.
        """
        plan = nearest_plan(self.tuned_plans, whole("budget", budget), guidance_scale)
        if plan is None:
            raise ValueError(
                f"this model has no plans tuned with guidance scale {guidance_scale:g}: make them with `fpdm tune`, or "
                "give a plan"
            )
        return self._choices(plan, budget)

    def _choices(self, plan: TunedPlan, budget: int) -> dict[str, Any]:
        return plan.choices(budget, cost_of(self.transformer), calls_of(self.scheduler, plan.scheduler))

    def _tuned_for(self, call: Mapping[str, Any]) -> dict[str, Any] | None:
        """The tuned plan that a call follows, as keyword arguments; None where it follows none."""
        plan = plan_for(self._own_plans, call)
        return None if plan is None else self._choices(plan, index(call["budget"]))

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of their numbers; none if they have no names."""
        return in_order(self.config.class_names or {})

    def plan(self, **call: Any) -> Plan:
        """The plan that `pipe(**call)` would follow, before anything runs. Raises ValueError as that would; but classes
        may be left out, and a network of latents need not have its autoencoder."""
        known = self.transformer is not None and self.transformer.config.num_classes
        usual = {"class_labels": 0 if known else None, "output_type": "latent"}
        return self.request(**{**usual, **call}).plan

    def labels(self, classes: int | str | Sequence[int | str] | None, num_images: int | None) -> Tensor | None:
        """Class labels (B,) int64 from numbers and names, one class standing for all images; None for no classes.

        Raises ValueError for a class that the model does not have.
        """
        return labels_of(classes, num_images, self.transformer.config.num_classes, self.class_names)

    @named
    def request(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images: int | None = None,
        *,
        budget: int | None = None,
        num_inference_steps: int | None = None,
        iterations: int | Sequence[int] | None = None,
        allocation: str | Sequence[float] | None = None,
        reuse: str | bool | None = None,
        solver: str | Solver | None = None,
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
    ) -> Request:
        """Draw images: `pipe(...)` with these arguments. (This function checks them, and `drawing` does what they say,
        which `pipe(...)` runs by itself, and `continuous` beside others.)

        class_labels         a class per image, by number or name; None draws without a class
        num_images           how many images: 1 by default, or as many as there are labels
        budget               transformer block passes per image; with iterations and timesteps see `make_plan`. Where
                             this is all that is said of a plan, the tuned plan nearest to it is taken, if there is one
                             for this guidance scale (see `tuned`); any of the next seven, or `pooled`, leaves it out
        num_inference_steps  timesteps, i.e. calls of the network
        iterations           of the fixed point at every timestep, or a list with one entry per timestep
        allocation           how iterations are shared out: "constant", "linear:0.5", ..., or a weight per timestep;
                             None for "constant"
        reuse                what a solve starts from: "none" for u, "plain" for the last timestep's solution, "linear"
                             or "quadratic" for what the last two or three foretell; True is "plain", False "none",
                             None for "plain"
        solver               "picard", "anderson", "broyden", or a Solver; None for "picard"
        scheduler            one of `fpdm.sampling.SCHEDULERS`; None uses the pipeline's own
        tolerance            relative residual at which an image's solve stops; what it leaves over it may spend at its
                             later timesteps. None spends exactly what is planned
        pooled               whether what is left over is shared out over the batch; images then depend on their batch
        guidance_scale       1 for none; above it, the network is evaluated twice (not counted in the budget). 0 is no
                             "off" here: it draws without the class
        guidance_interval    the training timesteps (low, high) at which to guide; None for all
        guidance_channels    how many channels to guide; None for all. Published results of DiT guide 3 of 4
        guidance_share       iterations of the unconditional evaluation, as a share of the conditional one's
        generator            one, which is reduced to a seed, or a list with one per image (CPU ones)
        seed, image_indices  image i of a seed is the same in every batch; indices default to 0, 1, 2, ...
        latents              noise (B, C, H, W) to start from instead
        callback_on_step_end called with (pipeline, index, timestep, {"latents": x}) after each timestep; may return
                             a dictionary with other latents, and end the call by `pipeline._interrupt = True`: what
                             there is by then is returned
        return_dict          False returns the tuple (images, report)

        Raises ValueError for what cannot be done, before anything runs.
        """
        for name in ("transformer", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"this pipeline has no {name}: it was opened without one")
        said: dict[str, Any] = {
            "budget": budget,
            "num_inference_steps": num_inference_steps,
            "iterations": iterations,
            "allocation": allocation,
            "reuse": reuse,
            "solver": solver,
            "scheduler": scheduler,
            "tolerance": tolerance,
        }
        tuned = self._tuned_for({**said, "pooled": pooled, "guidance_scale": guidance_scale})
        how = settled(said, tuned)
        plan = make_plan(
            cost_of(self.transformer),
            calls=calls_of(self.scheduler, how["scheduler"]),
            budget=how["budget"],
            num_steps=how["num_inference_steps"],
            iterations=how["iterations"],
            allocation=how["allocation"],
        )
        labels = self.labels(class_labels, num_images)
        count = (1 if num_images is None else whole("num_images", num_images)) if labels is None else len(labels)
        asked = Request(
            plan=plan,
            tuned=tuned is not None,
            labels=labels,
            randomness=Randomness(generator, seed, listed(image_indices), count),
            scheduler=how["scheduler"],
            solver=solver_of(how["solver"]),
            reuse=check_reuse(how["reuse"]),
            tolerance=how["tolerance"],
            pooled=pooled,
            guidance=guidance_of(guidance_scale, guidance_interval, guidance_channels, guidance_share),
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            on_step_end=callback_on_step_end,
            handed=callback_on_step_end_tensor_inputs or (),
        )
        asked.check(self)
        return asked

    def drawing(self, asked: Request, alone: bool = True) -> Drawing:
        """The course of a call: the evaluations of the network that it waits for. One that is `alone` shows how far it
        is, and an interrupt from before it is over."""
        if alone:
            self._interrupt = False
        generators = asked.randomness.generators()
        noise = initial_noise(self.transformer, generators)  # in any case: later draws do not depend on `latents`
        noise = noise if asked.latents is None else asked.latents
        with self.progress_bar(total=asked.plan.num_steps) if alone else tqdm(disable=True) as shown:

            def on_step(index: int, t: int, x: Tensor) -> Tensor | None:
                shown.update()
                if asked.on_step_end is None:
                    return None
                handed = {"latents": x} if "latents" in asked.handed else {}
                returned = asked.on_step_end(self, index, t, handed) or {}
                if extra := set(returned) - {"latents"}:
                    raise ValueError(f"callback_on_step_end returned {sorted(extra)}; it can only replace 'latents'")
                return replacing(x, returned.get("latents"))

            def interrupted() -> bool:
                asked, self._interrupt = self._interrupt, False  # of the call whose timestep it was, and no other
                return asked

            x, report = yield from course(
                self.transformer,
                self.scheduler,
                asked.plan,
                noise.to(self._execution_device),
                asked.labels,
                generators,
                scheduler=asked.scheduler,
                solver=asked.solver,
                tolerance=asked.tolerance,
                pooled=asked.pooled,
                reuse=asked.reuse,
                guidance=asked.guidance,
                on_step=on_step,
                interrupted=interrupted,
            )
        if report.diverged:
            logger.warning(f"{report.diverged} of {len(x)} images diverged: {Status.DIVERGED.message}")
        images = self.decode(x.nan_to_num(0, 0, 0) if report.diverged else x, asked.output_type)
        self.maybe_free_model_hooks()
        if not asked.return_dict:
            return images, report  # type: ignore[return-value]
        return FixedPointDiTPipelineOutput(images, report)

    __call__ = done(request)

    def continuous(
        self, calls: Iterable[Mapping[str, Any] | None], batch_size: int = 64, return_exceptions: bool = False
    ) -> Iterator[tuple[int, FixedPointDiTPipelineOutput | Exception]]:
        """Draw many calls at once, each under a plan of its own: continuous batching.

        calls              the keyword arguments of each; an iterator is asked for the next one when there is room. None
                           in place of one says that none is there at the moment: those under way go on, and it is
                           asked again. An iterator that waits for a call has those under way wait, too
        batch_size         evaluations of the network at a time; an image under guidance counts twice
        return_exceptions  yield what a call raises, its callbacks included, in place of its images, and go on

        Yields the number of each call and what `pipe(**call)` would return, as they finish; a tuned plan's iterations
        are Picard's here, whatever its solver is. Samples at different timesteps and iterations share every pass of the
        shared block, and leave room for others when they are solved: for many small calls that come one by one. Images
        of one plan are drawn faster by one call.
        Raises ValueError for an explicit network, and an offloaded one; and, unless exceptions are returned, for what a
        call would refuse, and a solver other than Picard: before anything runs where `calls` is a list, else once those
        that are under way are finished. A note tells the number of the call.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        check_parts(self.transformer)
        self._interrupt = False
        courses = courses_of(self, calls, one_by_one=return_exceptions)
        yield from continuous(courses, batch_size, return_exceptions)

    @torch.no_grad()
    def decode(self, x: Tensor, output_type: str = "pil") -> Any:
        """Images of the type asked for from samples (B, C, H, W), through the VAE where there is one."""
        if output_type == "latent":
            return x
        images = x if self.vae is None else self._through_vae(x)
        return self.image_processor.postprocess(images, output_type=output_type)

    def _through_vae(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) float32 of latents. An autoencoder that overflows in float16 becomes a float32 one."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = x / self.vae.config.scaling_factor + shift
        images = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
        if self.vae.dtype == torch.float16 and not images.isfinite().all():
            logger.warning("the autoencoder overflows in float16: it decodes in float32 from now on")
            images = self.vae.to(torch.float32).decode(latents.float()).sample
        return images  # type: ignore[no-any-return]
