"""Which devices are there."""

import torch


def pick_device(name: str) -> str:
    """`name`, or for "auto" the best there is. Raises ValueError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, found in there.items() if found)
    if not there.get(name, False):
        found = ", ".join(device for device in there if there[device])
        raise ValueError(f"device {name!r} is not available here; those that are: auto, {found}")
    return name
