"""Checkpoints: safetensors for tensors, JSON for the rest, written aside and renamed, so that none is ever half there.

checkpoints/step-00001000/weights.safetensors, ema.safetensors, optimizer.safetensors, state.json, checksums.json

The last one holds the SHA-256 of the others, so that a file that was damaged later is known.
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

from fpdm.files import checksum, read_json, steps_in, sync_folder, write_json
from fpdm.training.devices import like, whole
from fpdm.training.guard import Guard

NAME = "step-{:08d}"
TENSORS = ("weights", "ema", "optimizer")
FILES = (*(f"{name}.safetensors" for name in TENSORS), "state.json")
CHECKSUMS = "checksums.json"  # which earlier versions did not write
Tensors = dict[str, dict[str, Tensor]]


def gathered(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True) -> Tensors:
    """The tensors of a checkpoint on the CPU, by file and name. All processes must ask, where they are sharded; those
    that do not `keep` them get none."""
    named: Tensors = {
        "weights": dict(model.named_parameters()),
        "ema": dict(ema.named_parameters()),
        "optimizer": flatten_optimizer(model, optimizer),
    }
    found: Tensors = {file: {} for file in named}
    for file, some in named.items():
        for name, tensor in some.items():
            value = whole(tensor.detach())
            if keep:
                found[file][name] = value.to("cpu").contiguous()
    return found


def save(folder: Path, step: int, tensors: Tensors, state: dict[str, Any], keep: int) -> None:
    """Write the checkpoint of `step` below `folder`. Removes all but the last `keep`, and the last sound one; and what
    is there of later steps, which was damaged, or left behind by going back: the next start would take it for the
    newest. Raises OSError if the disk is full; earlier checkpoints are as they were."""

    def write(aside: Path) -> None:
        for name, named in tensors.items():
            save_file(named, aside / f"{name}.safetensors")
        write_json(aside / "state.json", {"step": step, **state})
        write_json(aside / CHECKSUMS, {path.name: checksum(path) for path in aside.iterdir()})

    try:
        replace_folder(folder / NAME.format(step), write)
    except OSError as error:
        raise OSError(f"the checkpoint of step {step} cannot be written: {error}. Earlier ones are kept") from error
    remove(folder, [other for other in steps_in(folder) if other > step])
    kept = {*all_steps(folder)[-keep:], *sound(folder)[-1:]}
    remove(folder, [other for other in all_steps(folder) if other not in kept])


def remove(folder: Path, steps: list[int]) -> None:
    """Remove the checkpoints of some steps, and what a process that was killed left of others."""
    for name in map(NAME.format, steps):
        (folder / name).rename(folder / f".{name}.old")  # so that none is ever half removed under its name
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def replace_folder(final: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a folder beside `final`, sync it, and put it in the place of `final`. Raises OSError if it
    cannot be written."""
    aside, old = (final.with_name(f".{final.name}.{what}") for what in ("writing", "old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(aside)
        for path in aside.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)  # on a full disk others need the room
        if isinstance(error, SafetensorError):
            raise OSError(str(error)) from error
        raise
    if final.exists():
        final.rename(old)
    sync_folder(aside)
    aside.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def all_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints below `folder` that lack nothing, rising."""
    paths = {step: folder / NAME.format(step) for step in steps_in(folder)}
    return [step for step, path in paths.items() if all((path / name).is_file() for name in FILES)]


def sound(folder: Path) -> list[int]:
    """The steps of the checkpoints below `folder` that were not written in a row of useless steps, rising."""

    def is_sound(step: int) -> bool:
        try:
            state = read_json(folder / NAME.format(step) / "state.json")
        except ValueError:  # damaged
            return False
        return not Guard.in_trouble(state.get("guard"))

    return list(filter(is_sound, all_steps(folder)))


def planned_steps(folder: Path, step: int) -> int | None:
    """How many steps the run was to have, and its learning rate to come down in, that wrote the checkpoint of `step`.
    None where that is damaged, or of an earlier version."""
    try:
        return read_json(folder / NAME.format(step) / "state.json").get("steps")  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def read(folder: Path, step: int) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the state of one checkpoint. Raises ValueError or OSError if it is damaged."""
    path = folder / NAME.format(step)
    for name, wanted in (read_json(path / CHECKSUMS) if (path / CHECKSUMS).is_file() else {}).items():
        if checksum(path / name) != wanted:
            raise ValueError(f"{name} is not what was written")
    try:
        tensors = {name: load_file(path / f"{name}.safetensors") for name in TENSORS}
        return tensors, read_json(path / "state.json")
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def newest(folder: Path, say: Callable[[str], Any], most: int | None = None) -> tuple[Tensors, dict[str, Any]] | None:
    """The newest checkpoint that can be read, of at most step `most`; None if there are none. One that is damaged or
    lacks a file is named through `say`; ValueError if all are so."""
    steps = [step for step in steps_in(folder) if most is None or step <= most]
    for step in reversed(steps):
        try:
            return read(folder, step)
        except (OSError, ValueError) as error:
            say(f"{folder / NAME.format(step)} is damaged ({error}): going back to the one before")
    if steps:
        raise ValueError(f"none of the checkpoints in {folder} can be read: remove the folder to start anew")
    return None


@torch.no_grad()
def restore(tensors: Tensors, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill the given objects with the tensors of a checkpoint."""
    for name, network in (("weights", model), ("ema", ema)):
        for key, parameter in network.named_parameters():
            parameter.copy_(like(tensors[name][key], parameter))
    restore_optimizer(model, optimizer, tensors["optimizer"])


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
    optimizer.state.clear()
    for key, value in flat.items():
        name, part = key.rsplit("/", 1)
        # A clone: on the CPU it would be the checkpoint's own tensor, which may be a view of the file.
        optimizer.state[parameters[name]][part] = like(value, parameters[name]).clone()
