"""Checkpoints: safetensors for tensors, JSON for the rest, written aside and renamed, so that none is ever half there.

checkpoints/step-00001000/weights.safetensors, ema.safetensors, optimizer.safetensors, state.json
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fpdm.files import read_json, write_json

NAME = "step-{:08d}"
FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> None:
    """Write the checkpoint of `step` below `folder` and remove all but the last `keep`. Raises OSError if the disk is
    full; earlier checkpoints are as they were."""

    def write(aside: Path) -> None:
        tensors: dict[str, dict[str, Any]] = {
            "weights": dict(model.named_parameters()),
            "ema": dict(ema.named_parameters()),
            "optimizer": flatten_optimizer(model, optimizer),
        }
        for name, named in tensors.items():
            save_file(_on_cpu(named), aside / f"{name}.safetensors")
        write_json(aside / "state.json", {"step": step, **state})

    try:
        replace_folder(folder / NAME.format(step), write)
    except SafetensorError as error:
        raise OSError(f"the checkpoint of step {step} cannot be written: {error}. Earlier ones are kept") from error
    for old in all_steps(folder)[:-keep]:
        shutil.rmtree(folder / NAME.format(old), ignore_errors=True)


def replace_folder(final: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a folder beside `final`, sync it, and put it in the place of `final`."""
    aside, old = (final.with_name(f".{final.name}.{what}") for what in ("writing", "old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    for path in aside.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    if final.exists():
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def all_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints below `folder`, rising."""
    complete = (path for path in folder.glob("step-*") if all((path / name).is_file() for name in FILES))
    return sorted(int(path.name.removeprefix("step-")) for path in complete)


def load_newest(
    folder: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, say: Callable[[str], Any]
) -> dict[str, Any] | None:
    """Restore the newest checkpoint that can be read into the given objects and return its state; None if there are no
    checkpoints. A damaged one is named through `say`; ValueError if all are damaged."""
    steps = all_steps(folder)
    for step in reversed(steps):
        path = folder / NAME.format(step)
        try:
            weights, average, moments = (load_file(path / name) for name in FILES[:3])
            state: dict[str, Any] = read_json(path / FILES[3])
        except (SafetensorError, OSError, ValueError) as error:
            say(f"{path} is damaged ({error}): going back to the one before")
            continue
        _fill(dict(model.named_parameters()), weights)
        _fill(dict(ema.named_parameters()), average)
        restore_optimizer(model, optimizer, moments)
        return state
    if steps:
        raise ValueError(f"none of the checkpoints in {folder} can be read: remove the folder to start anew")
    return None


def flatten_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors as "NAME OF PARAMETER/NAME OF STATE"."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """The inverse of `flatten_optimizer`. A fused AdamW keeps its step counts beside the parameters, too."""
    parameters = dict(model.named_parameters())
    for key, value in flat.items():
        name, part = key.rsplit("/", 1)
        optimizer.state[parameters[name]][part] = value.to(parameters[name].device)


@torch.no_grad()
def _fill(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
