"""Which devices are there, and which processes share the work."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Processes:
    """This process among those that a launcher started for one command: `accelerate launch -m fpdm` or `torchrun -m
    fpdm`. `index` counts from 0, which is the main one."""

    index: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        return self.index == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()


def pick_device(name: str) -> str:
    """`name`, or for "auto" the best there is. Raises ValueError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, found in there.items() if found)
    kind, _, number = name.partition(":")
    if not there.get(kind, False) or (number and not (number.isdecimal() and int(number) < torch.cuda.device_count())):
        found = ", ".join(device for device in there if there[device])
        raise ValueError(f"device {name!r} is not available here; those that are: auto, {found}")
    return name


def join_processes(device: str) -> Processes:
    """This process's place, and its device of the kind `device`, once all that were launched are here.

    Raises ValueError for a device that is not there.
    """
    device = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(device=device)
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return Processes(state.process_index, state.num_processes, str(state.device) if device == "cuda" else device)
