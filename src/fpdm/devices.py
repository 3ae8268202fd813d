"""Which devices are there, and which processes share the work."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

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

    def together(self, found: list[Any]) -> list[Any]:
        """What each process has found, in one list, the same in all."""
        if self.count == 1:
            return found
        lists: list[list[Any]] = [[]] * self.count
        torch.distributed.all_gather_object(lists, found)
        return [one for some in lists for one in some]

    def first(self, work: Callable[[], Any]) -> None:
        """Have the main process do something that may be refused, the others waiting. Where it is refused, the main one
        raises what it was, and the others end without a word."""
        refusal: Exception | None = None
        if self.main:
            try:
                work()
            except (ValueError, OSError) as error:
                refusal = error
        if self.count > 1:
            told = [refusal is not None]
            torch.distributed.broadcast_object_list(told, src=0)
            if told[0] and not self.main:
                raise SystemExit(2)
        if refusal is not None:
            raise refusal


def check_compiler(device: str) -> None:
    """Raises ValueError if torch.compile has nothing to compile with for a device."""
    if device.startswith("cuda"):
        from torch.utils._triton import has_triton  # of torch's own inner parts, which take long to import

        missing = "" if has_triton() else "Triton, which there is not: install it"
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
            missing = ""
        except InvalidCxxCompiler:
            missing = "a C++ compiler, which there is not: install g++ or clang++, name it in the environment as CXX"
    if missing:
        raise ValueError(f"--compile needs {missing}, or leave --compile out")


def pick_device(name: str) -> str:
    """`name`, or for "auto" the best there is. Raises ValueError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, found in there.items() if found)
    kind, _, number = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not there.get(kind, False) or (number and not (number.isdecimal() and int(number) < count)):
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

    # Hours: one may wait for the others to end what they began.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(hours=24))
    return Processes(state.process_index, state.num_processes, str(state.device) if device == "cuda" else device)
