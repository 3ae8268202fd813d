"""The complete description of a training run: frozen dataclasses, without torch, so that `--help` is quick.

Field names are unique over all groups: the command line sets each by its own flag.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from types import UnionType
from typing import Any, get_args, get_type_hints

from fpdm.names import INJECTIONS, unknown

SOURCES = ("auto", "digits", "folder", "idx", "npz", "datasets", "shards", "latents")
GRADIENTS = ("sjfb", "jfb", "multistep", "phantom", "implicit", "unroll")
TRACKERS = ("none", "tensorboard", "wandb")


def option(default: Any, help: str, **more: Any) -> Any:
    """A field with a help text; `choices` lists allowed values, `least` is the smallest, `most` the largest, `below`
    the first that is too large."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class ModelConfig:
    network: str = option("fpdm", "fixed point or explicit network", choices=("fpdm", "dit"))
    model: str | None = option(None, "preset: S, B, L or XL, slash, patch, e.g. S/4; single sizes below override it")
    patch_size: int | None = option(None, "side of a patch in pixels (or latents)", least=1)
    hidden_size: int | None = option(None, "width", least=4)
    num_heads: int | None = option(None, "attention heads", least=1)
    depth: int | None = option(None, "blocks of an explicit DiT", least=1)
    num_pre: int = option(1, "explicit blocks before the fixed point", least=0)
    num_core: int = option(1, "blocks in the shared group of the fixed point", least=1)
    num_post: int = option(1, "explicit blocks after the fixed point", least=0)
    time_in_pre_post: bool = option(False, "pre and post blocks see the timestep too")
    injection: str = option("mlp", "how the iterate comes into the shared blocks", choices=INJECTIONS)
    input_skip: bool = option(False, "what pre blocks return is added to what the injection's MLP returns")
    learned_variance: bool = option(True, "learn the variance, for DDPM sampling")


@dataclass(frozen=True)
class DataConfig:
    source: str = option("folder", "kind of data", choices=SOURCES)
    data: str | None = option(None, "folder of images, IDX files, shards or latents, .npz file, URLs, hub:NAME")
    split: str = option("train", "part to learn, of IDX files and of data sets of Hugging Face's, which have several")
    classes: int | None = option(None, "classes that the data must have; none takes what it has", least=0)
    image_size: int = option(32, "side of the images in pixels (or latents)", least=1)
    channels: int = option(3, "1 for grey, 3 for RGB; 4 or more for latents", least=1)
    vae: str | None = option(None, "autoencoder of latents: folder or hub name; none takes the one that made them")
    crop: str = option("center", "how images become square", choices=("center", "random"))
    flip: bool = option(False, "mirror half of the images")
    conditional: bool = option(True, "learn the classes, where the data has any")
    class_dropout: float = option(0.1, "share of images trained without class, for guidance", least=0, most=1)
    holdout: int = option(0, "images that are kept out of training, for the validation loss", least=0)
    workers: int = option(0, "processes that read images", least=0)


@dataclass(frozen=True)
class DiffusionConfig:
    beta_schedule: str = option("linear", "noise schedule", choices=("linear", "cosine"))
    prediction_type: str = option("epsilon", "what the network predicts", choices=("epsilon", "v_prediction", "sample"))
    zero_terminal_snr: bool = option(False, "pure noise at the last timestep (with v_prediction or sample)")
    min_snr_gamma: float | None = option(None, "min-SNR weighting, 5 in the paper; none weights all timesteps alike")
    num_train_timesteps: int = option(1000, "timesteps of the noise schedule", least=2)


@dataclass(frozen=True)
class GradientConfig:
    gradient: str = option("sjfb", "gradient through the fixed point", choices=GRADIENTS)
    no_grad_max: int = option(10, "iterations without gradient: sjfb draws up to N, the others make N", least=0)
    with_grad_max: int = option(12, "iterations with gradient: sjfb draws up to M, the others make M", least=1)
    damping: float = option(0.5, "phantom: share of f(z) in a step with gradient", least=0, most=1)
    tolerance: float = option(1e-3, "implicit: relative residual of the backward solve, of 30 iterations at most")
    exit_loss: str = option("none", "what a random earlier iterate is trained on", choices=("none", "target", "final"))
    exit_weight: float = option(1.0, "weight of the loss of that iterate", least=0)
    warm_share: float = option(
        0.0, "share of steps that start from the solution of a noisier timestep", least=0, most=1
    )
    checkpointing: bool = option(False, "recompute blocks in the backward pass instead of storing what they need")


@dataclass(frozen=True)
class OptimizerConfig:
    steps: int = option(400_000, "optimiser steps in all", least=1)
    batch_size: int = option(256, "images per step, over all processes", least=1)
    accumulation: int = option(1, "parts that a process's share of a batch is split into", least=1)
    lr: float = option(1e-4, "peak learning rate of AdamW", least=0)
    lr_schedule: str = option("constant", "learning rate after warm-up", choices=("constant", "cosine"))
    warmup: int = option(0, "steps over which the learning rate rises from 0", least=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", least=0)
    beta2: float = option(0.999, "AdamW's second decay rate", least=0, below=1)
    grad_clip: float = option(1.0, "largest norm of the gradient, 0 for any", least=0)
    skips: int = option(5, "steps in a row without a usable gradient after which training has diverged", least=1)
    ema: float = option(0.9999, "decay of the weights' moving average; rises to this from 0.1", least=0, most=1)


@dataclass(frozen=True)
class RunConfig:
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda", "mps"))
    mixed_precision: str = option("no", "bf16 where the device is good at it", choices=("no", "bf16"))
    tf32: bool = option(True, "matrix products of float32 in TF32, where the device has it")
    compile: bool = option(False, "compile the blocks (torch.compile)")
    sharding: str = option("none", "share parameters and optimiser over processes (FSDP2)", choices=("none", "fsdp"))
    init_from: str | None = option(None, "model folder (or hub name) to fine-tune")
    log_every: int = option(50, "steps between lines of the log", least=1)
    sample_every: int = option(1000, "steps between sample grids", least=1)
    sample_budget: int = option(160, "block passes per image of the sample grids", least=1)
    validate_every: int = option(1000, "steps between looks at the validation loss and the residuals", least=1)
    checkpoint_every: int = option(1000, "steps between checkpoints", least=1)
    keep_checkpoints: int = option(2, "checkpoints to keep", least=1)
    on_divergence: str = option(
        "stop", "or back to the last checkpoint, at half the rate", choices=("stop", "rollback")
    )
    on_full_disk: str = option("stop", "or go on without that checkpoint", choices=("stop", "continue"))
    time_limit: float | None = option(None, "minutes after which the queue ends the job: save and stop before", least=1)
    tracker: str = option("none", "where to follow the run besides log.jsonl", choices=TRACKERS)


@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    gradient: GradientConfig = GradientConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()

    def with_fields(self, **changes: Any) -> "Config":
        """A copy with single fields changed, by their names. What only a fixed point network has goes back to its
        default where the network becomes an explicit one, and what only an MLP has where the injection becomes a gate.

        Raises ValueError for an unknown field or a bad value."""
        homes = {name: group for group, name in field_names()}
        if changes.get("network") == "dit":
            changes = {**{name: getattr(groups()[homes[name]](), name) for name in FIXED_POINT_ONLY}, **changes}
        if changes.get("injection") == "gate":
            changes = {"input_skip": False, **changes}
        for name in changes:
            if name not in homes:
                raise ValueError(unknown("field", name, homes))
        config = self
        for name, value in changes.items():
            group = homes[name]
            config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
        config.check()
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The config that `to_dict` gave; fields that it does not have are as by default."""
        known = {name: values[group][name] for group, name in field_names() if name in values.get(group, {})}
        return cls().with_fields(**known)

    def check(self) -> None:
        """Raises ValueError for a value out of range or of the wrong kind, naming the field."""
        for group, name in field_names():
            check_value(getattr(self, group), name)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# What may differ between the parts of one run: how long, how often and where, but not what is learned from what.
# `data` and `split` say where the images are; these themselves are compared by fingerprint.
CHANGEABLE = {
    "steps", "log_every", "sample_every", "sample_budget", "validate_every", "checkpoint_every", "keep_checkpoints",
    "accumulation", "workers", "device", "tracker", "data", "source", "split", "vae", "checkpointing", "tf32",
    "compile", "sharding", "on_divergence", "on_full_disk", "time_limit",
}  # fmt: skip


# Settings of fixed point networks, and of how they are trained.
FIXED_POINT_NETWORK = ("num_pre", "num_core", "num_post", "time_in_pre_post", "injection", "input_skip")
FIXED_POINT_ONLY = (
    *FIXED_POINT_NETWORK, "gradient", "no_grad_max", "with_grad_max", "damping", "tolerance", "exit_loss",
    "exit_weight", "warm_share",
)  # fmt: skip


def groups() -> dict[str, type]:
    return {f.name: type(f.default) for f in fields(Config)}


def field_names() -> list[tuple[str, str]]:
    """(group, field) of every field."""
    return [(group, f.name) for group, cls in groups().items() for f in fields(cls)]


def check_value(group: Any, name: str) -> None:
    metadata = next(f.metadata for f in fields(group) if f.name == name)
    value, allowed = getattr(group, name), value_type(type(group), name)
    if value is None and is_optional(type(group), name):
        return
    if isinstance(value, bool) is not (allowed is bool) or not isinstance(
        value, (allowed, int) if allowed is float else allowed
    ):
        raise ValueError(f"{name} is {value!r}; it must be a value of type {allowed.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be a finite number")
    if "choices" in metadata and value not in metadata["choices"]:
        raise ValueError(unknown(name, str(value), map(str, metadata["choices"])))
    too_large = "below" in metadata and value >= metadata["below"]
    if too_large or not metadata.get("least", value) <= value <= metadata.get("most", value):
        words = {"least": "at least", "most": "at most", "below": "below"}
        bounds = ", ".join(f"{word} {metadata[bound]}" for bound, word in words.items() if bound in metadata)
        raise ValueError(f"{name} is {value}; it must be {bounds}")


@cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a group's fields, which are written as text there."""
    return get_type_hints(cls)


def is_optional(cls: type, name: str) -> bool:
    """Whether a field may be None."""
    return type(None) in get_args(hints(cls)[name])


def value_type(cls: type, name: str) -> type:
    """The type of a field's values, None aside."""
    hint = hints(cls)[name]
    return next(t for t in get_args(hint) if t is not type(None)) if isinstance(hint, UnionType) else hint


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields whose change makes another run: name -> (before, now). One that an older version did not have was what
    it is by default. Those that say nothing of an explicit network are not compared between two of them."""
    explicit = old.get("model", {}).get("network") == new["model"]["network"] == "dit"
    return {
        name: (was, new[group][name])
        for group, name in field_names()
        if name not in CHANGEABLE
        and not (explicit and name in FIXED_POINT_ONLY)
        and (was := old.get(group, {}).get(name, getattr(groups()[group](), name))) != new[group][name]
    }
