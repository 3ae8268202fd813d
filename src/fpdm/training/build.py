"""From a config to the objects of a run. Everything that can be refused is refused here, before the first step."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fpdm.data import (
    BrokenImage,
    ImagePreparation,
    LatentFolder,
    LatentPreparation,
    Source,
    holds_latents,
    open_images,
)
from fpdm.data.encoding import described, open_autoencoder
from fpdm.data.stream import Prepare
from fpdm.diffusion import DiffusionLoss, make_schedule
from fpdm.files import model_folder
from fpdm.keyed import generator, seed_of
from fpdm.models import Denoiser, DiT, FixedPointDiT
from fpdm.models.presets import preset
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.training.config import FIXED_POINT_NETWORK, Config, DataConfig, GradientConfig, ModelConfig
from fpdm.training.course import Course, Courses, differentiated, make_courses, operations
from fpdm.training.draws import Drawing, Draws
from fpdm.training.validation import split

FIRST_LOOK = 100  # images tried before a data set counts as unreadable
# Settings that have an effect only where another has such a value; "!none" is any but that.
ONLY_WITH = {
    "damping": ("gradient", "phantom"),
    "tolerance": ("gradient", "implicit"),
    "exit_weight": ("exit_loss", "!none"),
}


@dataclass(frozen=True)
class Parts:
    """What a run is made of, on the CPU.

    source, held  the images to train on, and those kept out for validation, if any
    prepare       makes of what they load what the network takes
    courses       what steps ask of a fixed point network; None for an explicit one
    vae           of a model of latents
    """

    config: Config
    source: Source
    held: Source | None
    prepare: Prepare
    model: Denoiser
    schedule: object
    loss: DiffusionLoss
    courses: Courses | None
    vae: AutoencoderKL | None = None

    def course(self, step: int) -> Course | None:
        """What a step asks of the network; the same on all processes."""
        return None if self.courses is None else self.courses.of(self.config.run.seed, step)

    @property
    def drawing(self) -> Drawing:
        """What makes training examples of images."""
        return Drawing(self.config.run.seed, self.loss.num_timesteps, self.config.data.class_dropout, self.courses)

    def labels(self, labels: Tensor, dropped: Tensor) -> Tensor:
        """The classes (B,) that the network is told: none where they are withheld, or where it knows none."""
        return labels.masked_fill(dropped, self.model.null_class) if self.model.config.num_classes else 0 * labels

    @torch.no_grad()
    def start(self, model: Any, course: Course, chance: Draws, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor | None:
        """What a warm step's solve starts from, the solution at noisier timesteps; None for a cold one.

        model  the network as it is called: it may be wrapped
        """
        if course.warm is None:
            return None
        assert chance.later is not None
        assert chance.fresh is not None
        later, fresh = (value.to(x_t.device, non_blocking=True) for value in (chance.later, chance.fresh))
        noisier = self.loss.noisier(x_t, t, later, fresh)
        solution: Tensor = model(noisier, later, labels, solve=course.warm).solution.value
        # Autocast keeps its casts of the weights. Those made here have no gradient, and would be used again.
        torch.clear_autocast_cache()
        return solution

    def fresh(self) -> Denoiser:
        """Another network of the same kind."""
        return build_model(self.config, self.source)

    @property
    def typical(self) -> int:
        """Iterations of a step of the training, about: what the validation loss is measured with."""
        if self.courses is None:
            return 0
        cold = replace(self.courses, warm_share=0.0)
        draws = [cold.draw(generator("typical", i)).solve for i in range(100)]
        return round(sum(differentiated(solve)[-1] for solve in draws) / len(draws))

    def operations(self, course: Course | None) -> float:
        """Operations per image of a step: see `operations`."""
        return operations(self.model) if course is None else operations(self.model, course.solve, course.warm)


def build(config: Config, stand_in: Source | None = None) -> Parts:
    """The parts of a run; `stand_in`, of latents, takes the place of the data that the config names.

    Raises ValueError for data that is not there, sizes that do not fit, settings that contradict each other.
    """
    opened = stand_in or open_source(config.data)
    schedule = make_schedule(
        beta_schedule=config.diffusion.beta_schedule,
        prediction_type=config.diffusion.prediction_type,
        zero_terminal_snr=config.diffusion.zero_terminal_snr,
        learned_variance=config.model.learned_variance,
        clip_sample=not isinstance(opened, LatentFolder),
        num_train_timesteps=config.diffusion.num_train_timesteps,
    )
    loss = DiffusionLoss(schedule, config.diffusion.min_snr_gamma)
    source: Source
    source, held = split(opened, config.data.holdout, config.run.seed)
    prepare = preparation(config.data, opened) if stand_in is None else LatentPreparation(1.0, 0.0)
    model = build_model(config, source)
    vae = open_vae(config.data, opened) if isinstance(opened, LatentFolder) else None
    if config.run.init_from is not None:
        load_pretrained(model, config.run.init_from, source, vae)
    if config.gradient.checkpointing:
        model.enable_gradient_checkpointing()
    courses = make_courses(config.gradient, model.config.num_core) if isinstance(model, FixedPointDiT) else None
    return Parts(config, source, held, prepare, model, schedule, loss, courses, vae)


def open_source(config: DataConfig) -> Source:
    """The images that a config names. Raises ValueError if there are none that can be read."""
    if not config.data and config.source != "digits":
        raise ValueError("this recipe needs data: name a folder of images, or what else `fpdm train --help` lists, "
                         "with --data PATH")  # fmt: skip
    place = config.data or "digits"
    latents = config.source == "latents" or (config.source == "auto" and holds_latents(Path(place)))
    if latents and config.split != DataConfig().split:
        raise ValueError(
            f"split {config.split!r} has no effect on latents: leave it out, or encode it with `fpdm latents --split`"
        )
    source: Source = (
        LatentFolder(place)
        if latents
        else open_images(place, config.channels, config.split, config.source, config.image_size)
    )
    if config.classes is not None and config.conditional and len(source.class_names) != config.classes:
        without = "" if config.classes else ": --no-conditional learns all as one"
        raise ValueError(
            f"{place} has {len(source.class_names)} classes, and this recipe is for {config.classes}{without}"
        )
    for index in range(min(FIRST_LOOK, len(source))):
        try:
            source.load(index)
            return source
        except BrokenImage as error:
            reason = error
    raise ValueError(f"none of the first {min(FIRST_LOOK, len(source))} images in {place} can be read: {reason}")


def preparation(config: DataConfig, source: Source) -> Prepare:
    """What makes of an image what a network takes. Raises ValueError for latents of another size, or not mirrored, and
    for a setting that would have no effect."""
    if not isinstance(source, LatentFolder):
        if config.vae is not None:
            raise ValueError("vae has no effect on images, which are learnt in pixels: leave it out, or take latents")
        return ImagePreparation(config.image_size, config.crop, config.flip)
    if source.shape[1:] != (config.image_size, config.image_size):
        raise ValueError(f"image_size is {config.image_size}, and the latents in {config.data} are {source.shape[1:]}")
    if config.crop != DataConfig().crop:
        raise ValueError(f"crop {config.crop} has no effect on latents, which are of cropped images: leave it out")
    if config.flip and not source.mirrored:
        raise ValueError(
            f"{config.data} has no mirrored latents: make them with `fpdm latents --flip`, or take --no-flip"
        )
    return LatentPreparation(source.autoencoder.scale, source.autoencoder.shift, config.flip)


def open_vae(config: DataConfig, source: LatentFolder) -> AutoencoderKL:
    """The autoencoder of cached latents, which the model folder is to carry.

    Raises ValueError if it is not where the cache says, or another one.
    """
    name = config.vae or source.autoencoder.name
    try:
        vae, found = open_autoencoder(name)
    except ValueError as error:
        raise ValueError(
            f"{error}. The latents in {config.data} were made with it: say where it is with --vae"
        ) from error
    if found.known_by != source.autoencoder.known_by:
        raise ValueError(
            f"{name} is another autoencoder than the one that made the latents in {config.data}, "
            f"{source.autoencoder.name}: name that one with --vae"
        )
    return vae.requires_grad_(False)


def build_model(config: Config, source: Source) -> Denoiser:
    """The network of a config for the images of a source, its weights drawn from the seed."""
    wanted = config.model
    sizes = dict.fromkeys(("hidden_size", "num_heads", "patch_size", "depth"))
    sizes |= preset(wanted.model) if wanted.model else {}
    sizes |= {name: value for name in sizes if (value := getattr(wanted, name)) is not None}
    check_used(config, source)
    if wanted.network == "fpdm":
        del sizes["depth"]
    if missing := [name for name, value in sizes.items() if value is None]:
        raise ValueError(f"the size of the network is open: give a preset (--model S/4) or {', '.join(missing)}")
    settings = {
        **sizes,
        "sample_size": config.data.image_size,
        "in_channels": source.channels,
        "num_classes": len(source.class_names) if config.data.conditional else 0,
        "learned_variance": wanted.learned_variance,
    }
    with torch.random.fork_rng(devices=[]):  # the networks' initialisation draws from the global generator
        torch.manual_seed(seed_of(config.run.seed, "weights"))
        if wanted.network == "dit":
            return DiT(**settings)
        return FixedPointDiT(**settings, **{name: getattr(wanted, name) for name in FIXED_POINT_NETWORK})


def check_used(config: Config, source: Source) -> None:
    """Raises ValueError for a setting that would have no effect: it was meant to have one."""
    if config.data.channels != source.channels:
        raise ValueError(f"channels is {config.data.channels}, and these images have {source.channels}")
    if not config.data.conditional and config.data.class_dropout != DataConfig().class_dropout:
        raise ValueError("class_dropout has no effect without conditional, as no classes are learnt: leave it out")
    gradient, defaults = config.gradient, GradientConfig()
    for name, (field, value) in ONLY_WITH.items():
        if getattr(gradient, name) != getattr(defaults, name) and not matches(getattr(gradient, field), value):
            raise ValueError(f"{name} has no effect with {field} {getattr(gradient, field)}: leave it out")
    if config.model.network == "fpdm":
        if config.model.depth is not None:
            raise ValueError("depth belongs to an explicit DiT; a fixed point network has num_pre, num_core, num_post")
        return
    for name in ("gradient", "exit_loss", "warm_share"):
        if getattr(gradient, name) != getattr(defaults, name):
            raise ValueError(f"{name} belongs to a fixed point network; an explicit DiT has nothing to iterate")
    for name in FIXED_POINT_NETWORK:
        if getattr(config.model, name) != getattr(ModelConfig(), name):
            raise ValueError(f"{name} belongs to a fixed point network; an explicit DiT has a depth")


def matches(value: str, wanted: str) -> bool:
    return value != wanted[1:] if wanted.startswith("!") else value == wanted


def load_pretrained(model: Denoiser, folder: str, source: Source, vae: AutoencoderKL | None) -> None:
    """Copy the weights of a model folder into `model`. Where the classes are others, labels start anew, with a warning;
    classes without names are taken for the same if they are as many.

    Raises ValueError if the networks differ in anything else, naming the settings, or the autoencoders do.
    """
    pipeline = FixedPointDiTPipeline.from_pretrained(model_folder(folder))
    own, other = (None if v is None else described(v).known_by for v in (pipeline.vae, vae))
    if own != other:
        has = "no autoencoder" if pipeline.vae is None else "an autoencoder of its own"
        raise ValueError(
            f"the model in {folder} has {has}, so its weights mean something else than these data: take latents of its "
            "own autoencoder (`fpdm latents --vae`), or leave --init-from out"
        )
    old = pipeline.transformer
    keys = [key for key in {**old.config, **model.config} if not key.startswith("_") and key != "num_classes"]
    if type(old) is not type(model):
        raise ValueError(f"{folder} holds a {type(old).__name__}, and a {type(model).__name__} is to be trained")
    if different := [f"{key} {old.config.get(key)}, not {model.config.get(key)}" for key in keys
                     if old.config.get(key) != model.config.get(key)]:  # fmt: skip
        raise ValueError(f"the network in {folder} has {'; '.join(different)}: set these to what it has")
    weights = old.state_dict()
    names = source.class_names if model.config.num_classes else []
    as_many = old.config.num_classes == model.config.num_classes
    if not as_many or pipeline.class_names not in ([], names):
        weights["label_embed.weight"] = model.label_embed.weight.detach()
        if old.config.num_classes and model.config.num_classes:
            warnings.warn(
                f"the classes of the model in {folder} are not those of the data: what it learnt of them is left out",
                stacklevel=2,
            )
    model.load_state_dict(weights)
