"""Checkpoints: safetensors for tensors, JSON for the rest, written aside and renamed, so that none is ever half there.

checkpoints/step-00001000/weights.safetensors, ema.safetensors, optimizer.safetensors, state.json
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NAME = "step-{:08d}"


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` below `folder` and remove all but the last `keep`."""

    def write(aside: Path) -> None:
        save_file(_on_cpu(dict(model.named_parameters())), aside / "weights.safetensors")
        save_file(_on_cpu(dict(ema.named_parameters())), aside / "ema.safetensors")
        save_file(_on_cpu(flatten_optimizer(model, optimizer)), aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": step, **state}))

    final = folder / NAME.format(step)
    replace_folder(final, write)
    for old in all_steps(folder)[:-keep]:
        shutil.rmtree(folder / NAME.format(old), ignore_errors=True)
    return final


def replace_folder(final: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a folder beside `final`, sync it, and put it in the place of `final`."""
    aside = final.with_name(f".{final.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    for path in aside.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)


def all_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints below `folder`, rising."""
    names = (path.name for path in folder.glob("step-*") if (path / "state.json").is_file())
    return sorted(int(name.removeprefix("step-")) for name in names)


def load(folder: Path, step: int, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore the checkpoint of `step` into the given objects and return its state."""
    path = folder / NAME.format(step)
    for module, name in ((model, "weights"), (ema, "ema")):
        _fill(dict(module.named_parameters()), load_file(path / f"{name}.safetensors"))
    restore_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"))
    return json.loads((path / "state.json").read_text())


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
