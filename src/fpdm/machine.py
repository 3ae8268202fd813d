"""What a result was made with."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("fpdm", "torch", "diffusers", "numpy")


def made_with(device: str) -> dict[str, Any]:
    """Hardware, threads, and versions of what computes."""
    hardware = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    return {
        "device": device,
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
    }


def cores() -> int:
    """How many cores this process may use: fewer than there are where it is bound to some, by `taskset` or Slurm."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(processes: int) -> int:
    """The threads of each of several processes that share what this one would compute with, which OMP_NUM_THREADS and
    the cores that it is bound to limit: more threads than cores wait for each other, at half the speed or less."""
    return max(1, torch.get_num_threads() // processes)


def matrix_rate(device: torch.device, dtype: torch.dtype, rows: int, width: int, seconds: float = 0.05) -> float:
    """Operations per second of a linear layer, `width` to 4 `width`, on so many rows: the rate that a transformer's
    blocks cannot exceed on this device. Two operations per multiply-add; the best of the runs that fit into `seconds`,
    at least three."""
    x = torch.randn(max(1, rows), width, device=device, dtype=dtype)  # of zeros a GPU makes them faster
    weight = torch.randn(width, 4 * width, device=device, dtype=dtype)
    best, began, runs = float("inf"), time.perf_counter(), 0
    while runs < 4 or time.perf_counter() - began < seconds:  # the first one warms up
        started = time.perf_counter()
        (x @ weight)[0, 0].item()  # which waits for the device
        best, runs = min(best, time.perf_counter() - started if runs else best), runs + 1
    return 2 * x.shape[0] * width * 4 * width / best


def processor() -> str:
    """The name of the processor, as well as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
