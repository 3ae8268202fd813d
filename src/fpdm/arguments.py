"""What a call of the pipeline is given, made into what the sampling takes: each refuses what cannot be."""

import math
import operator
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fpdm.fixedpoint import Picard, Solver
from fpdm.names import unknown
from fpdm.sampling import Guidance, check_reuse, listed, solver_of

NO_GUIDANCE, EVERYWHERE = Guidance(), (0.0, math.inf)
P = ParamSpec("P")
R = TypeVar("R")


def named(method: Callable[P, R]) -> Callable[P, R]:
    """The method, with a TypeError that knows the right name for an argument that it does not have."""
    known = [name for name in signature(method).parameters if name != "self"]

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if other := next((name for name in kwargs if name not in known), None):
            raise TypeError(unknown("argument", other, known))
        return method(*args, **kwargs)

    return call


def guidance_of(
    scale: float, interval: Sequence[float] | None = None, channels: int | None = None, share: float = 1.0
) -> Guidance:
    """Raises ValueError for values that cannot be."""
    interval = listed(interval)
    if interval is not None and not isinstance(interval, Sequence):
        raise ValueError(f"guidance_interval is {interval!r}; it must be two timesteps, the lower one first")
    limits: Any = EVERYWHERE if interval is None else tuple(interval)
    return Guidance(scale, limits, channels, share)


def asked_of_solves(reuse: str | bool, solver: str | Solver, tolerance: float | None, pooled: bool) -> list[str]:
    """Which of these options are not left as they are."""
    asked = {
        "reuse": check_reuse(reuse) == "linear" or reuse == "quadratic",
        "solver": solver_of(solver) != Picard(),
        "tolerance": tolerance is not None,
        "pooled": pooled,
    }
    return [name for name, value in asked.items() if value]


def labels_of(
    classes: int | str | Sequence[int | str] | None, num_images: int | None, count: int, names: Sequence[str]
) -> Tensor | None:
    """Class labels (B,) int64 from numbers and names of `count` classes, one class standing for all images; None for no
    classes.

    Raises ValueError for a class that there is not.
    """
    if classes is None:
        return None
    num_images, classes = None if num_images is None else whole("num_images", num_images), listed(classes)
    each = list(classes) if isinstance(classes, Sequence) and not isinstance(classes, str) else [classes]
    if count == 0:
        raise ValueError("this model is unconditional: it has no classes. Leave class_labels out")
    numbers = [_class_number(label, count, names) for label in each]
    if num_images not in (None, len(numbers)) and len(numbers) != 1:
        raise ValueError(f"num_images is {num_images} and there are {len(numbers)} class labels: give one of the two")
    return torch.tensor(numbers * num_images if num_images is not None and len(numbers) == 1 else numbers)


def _class_number(label: Any, count: int, names: Sequence[str]) -> int:
    if isinstance(label, str):
        if not names:
            raise ValueError(f"the classes of this model have no names, so not {label!r}: give a number below {count}")
        if label not in names:
            raise ValueError(unknown("class", label, names))
        return names.index(label)
    try:
        number = operator.index(label)
    except TypeError:
        raise ValueError(f"class {label!r} is neither a number nor a name") from None
    if not 0 <= number < count:
        raise ValueError(f"class {label} is out of range: this model has classes 0 to {count - 1}")
    return number


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError for what is no noise of this shape."""
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents are {type(latents).__name__}; these images need a tensor of {shape}")
    if latents.shape != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; these images need {shape}")


def replacing(x: Tensor, latents: Any) -> Tensor | None:
    """What a callback returned in place of `x` (B, C, H, W) float32, if anything. Raises ValueError where that cannot
    be."""
    if latents is None:
        return None
    if not isinstance(latents, Tensor) or latents.shape != x.shape:
        what = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"callback_on_step_end returned latents {what}; they must be a tensor of {tuple(x.shape)}")
    return latents.to(x)


def whole(name: str, value: Any) -> int:
    """Raises ValueError for what is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be a whole number") from None
