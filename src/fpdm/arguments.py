"""What a call of the pipeline is given, made into what the sampling takes: each refuses what cannot be."""

import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fpdm.fixedpoint import Picard, Solver
from fpdm.names import unknown
from fpdm.sampling import Guidance, check_reuse, image_generators, solver_of

NO_GUIDANCE, EVERYWHERE = Guidance(), (0.0, math.inf)


def guidance_of(
    scale: float, interval: Sequence[float] | None = None, channels: int | None = None, share: float = 1.0
) -> Guidance:
    """Raises ValueError for values that cannot be."""
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
    if hasattr(classes, "tolist"):  # NumPy's and torch's numbers and arrays
        classes = classes.tolist()
    listed = list(classes) if isinstance(classes, Sequence) and not isinstance(classes, str) else [classes]
    if count == 0:
        raise ValueError("this model is unconditional: it has no classes. Leave class_labels out")
    numbers = [_class_number(label, count, names) for label in listed]
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


def generators_of(
    given: torch.Generator | Sequence[torch.Generator] | None,
    seed: int | None,
    indices: Sequence[int] | None,
    count: int,
) -> list[torch.Generator]:
    """One generator per image, from whichever the caller gave."""
    if count < 1:
        raise ValueError(f"there are {count} images to draw; it must be at least 1")
    if given is not None and seed is not None:
        raise ValueError("give a generator or a seed, not both")
    if given is not None and indices is not None:
        raise ValueError("image_indices go with a seed: leave the generator out")
    if given is not None and not isinstance(given, torch.Generator):
        if not isinstance(given, Sequence) or not all(isinstance(one, torch.Generator) for one in given):
            raise ValueError(f"generator is {given!r}; it must be a torch.Generator, or a list with one per image")
        if len(given) != count:
            raise ValueError(f"{len(given)} generators for {count} images: give one, or one per image")
        return list(given)
    if indices is not None and len(indices) != count:
        raise ValueError(f"{len(indices)} image_indices for {count} images: give one per image")
    if seed is None:
        device = "cpu" if given is None else given.device
        seed = int(torch.randint(2**62, (1,), generator=given, device=device))
    return image_generators(whole("seed", seed), range(count) if indices is None else indices)


@contextmanager
def unmoved(given: Any) -> Iterator[None]:
    """Draw from these generators, or from torch's own, and leave them as they were."""
    listed = given if isinstance(given, Sequence) else [given]
    generators = [one for one in listed if isinstance(one, torch.Generator)] or [torch.default_generator]
    states = [one.get_state() for one in generators]
    try:
        yield
    finally:
        for one, state in zip(generators, states, strict=True):
            one.set_state(state)


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
