"""From a config to the objects of a run. Everything that can be refused is refused here, before the first step."""

from dataclasses import dataclass

import torch

from fpdm.data import ImageFolder, Source, digits, idx_folder
from fpdm.data.sources import BrokenImage
from fpdm.diffusion import DiffusionLoss, make_schedule
from fpdm.files import model_folder
from fpdm.fixedpoint import Solve, StochasticJacobianFree
from fpdm.keyed import seed_of
from fpdm.models import Denoiser, DiT, FixedPointDiT
from fpdm.models.presets import preset
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.training.config import Config, DataConfig, ModelConfig

FIRST_LOOK = 100  # images tried before a data set counts as unreadable


@dataclass(frozen=True)
class Parts:
    """What a run is made of, on the CPU."""

    source: Source
    model: Denoiser
    schedule: object
    loss: DiffusionLoss
    gradient: StochasticJacobianFree | None

    def solve(self, generator: torch.Generator) -> dict[str, Solve]:
        """The keyword arguments of this step's calls of the network, iteration counts drawn from `generator`."""
        return {} if self.gradient is None else {"solve": Solve(gradient=self.gradient.draw(generator))}


def build(config: Config) -> Parts:
    """Raises ValueError for data that is not there, sizes that do not fit, settings that contradict each other."""
    schedule = make_schedule(
        beta_schedule=config.diffusion.beta_schedule,
        prediction_type=config.diffusion.prediction_type,
        zero_terminal_snr=config.diffusion.zero_terminal_snr,
        learned_variance=config.model.learned_variance,
        clip_sample=True,  # pixels
        num_train_timesteps=config.diffusion.num_train_timesteps,
    )
    loss = DiffusionLoss(schedule, config.diffusion.min_snr_gamma)
    source = open_source(config.data)
    model = build_model(config, source)
    if config.run.init_from is not None:
        load_pretrained(model, config.run.init_from, source)
    gradient = None
    if isinstance(model, FixedPointDiT):
        ranges = (0, config.gradient.no_grad_max), (1, config.gradient.with_grad_max)
        gradient = StochasticJacobianFree(*ranges).for_group(model.config.num_core)
    return Parts(source, model, schedule, loss, gradient)


def open_source(config: DataConfig) -> Source:
    """The images that a config names. Raises ValueError if there are none that can be read."""
    if config.source == "digits":
        return digits()
    if config.data is None:
        wanted = "the folder with the four IDX files" if config.source == "idx" else "a folder of images"
        raise ValueError(f"this recipe needs data: name {wanted} with --data PATH")
    source = idx_folder(config.data) if config.source == "idx" else ImageFolder(config.data, config.channels)
    for index in range(min(FIRST_LOOK, len(source))):
        try:
            source.load(index)
            return source
        except BrokenImage as error:
            reason = error
    raise ValueError(f"none of the first {min(FIRST_LOOK, len(source))} images in {config.data} can be read: {reason}")


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
        names = ("num_pre", "num_core", "num_post", "time_in_pre_post")
        return FixedPointDiT(**settings, **{name: getattr(wanted, name) for name in names})


def check_used(config: Config, source: Source) -> None:
    """Raises ValueError for a setting that would have no effect: it was meant to have one."""
    if config.data.channels != source.channels:
        raise ValueError(f"channels is {config.data.channels}, and these images have {source.channels}")
    if config.model.network == "fpdm":
        if config.model.depth is not None:
            raise ValueError("depth belongs to an explicit DiT; a fixed point network has num_pre, num_core, num_post")
        return
    for name in ("num_pre", "num_core", "num_post", "time_in_pre_post"):
        if getattr(config.model, name) != getattr(ModelConfig(), name):
            raise ValueError(f"{name} belongs to a fixed point network; an explicit DiT has a depth")


def load_pretrained(model: Denoiser, folder: str, source: Source) -> None:
    """Copy the weights of a model folder into `model`. Where the classes are others, labels start anew.

    Raises ValueError if the networks differ in anything else, naming the settings.
    """
    pipeline = FixedPointDiTPipeline.from_pretrained(model_folder(folder))
    old = pipeline.transformer
    keys = [key for key in {**old.config, **model.config} if not key.startswith("_") and key != "num_classes"]
    if type(old) is not type(model):
        raise ValueError(f"{folder} holds a {type(old).__name__}, and a {type(model).__name__} is to be trained")
    if different := [f"{key} {old.config.get(key)}, not {model.config.get(key)}" for key in keys
                     if old.config.get(key) != model.config.get(key)]:  # fmt: skip
        raise ValueError(f"the network in {folder} has {'; '.join(different)}: set these to what it has")
    weights = old.state_dict()
    if pipeline.class_names != (source.class_names if model.config.num_classes else []):
        weights["label_embed.weight"] = model.label_embed.weight.detach()
    model.load_state_dict(weights)
