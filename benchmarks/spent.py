"""Where the seconds of drawing and training go: a part of performance.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from drawing import ITERATIONS, Ceiling, Row, batch_of, network
from harness import compare
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fpdm.fixedpoint import MultiStepJacobianFree, Solve

NO_GRAD, WITH_GRAD = 10, 12
KINDS = {"products": ("_linear_pointwise", "::mm", "::addmm"), "attention": ("scaled_dot_product",)}


def kind_of(operation: str) -> str:
    return next((kind for kind, names in KINDS.items() if any(name in operation for name in names)), "others")


def training_step(model: Any, size: int) -> Callable[[], None]:
    """Forward and backward with the most iterations of N = 10 and M = 12."""
    solve = Solve(gradient=MultiStepJacobianFree(NO_GRAD, WITH_GRAD))
    x, t, y = batch_of(size)

    def step() -> None:
        model.zero_grad()
        model(x, t, y, solve=solve).sample.square().mean().backward()

    return step


def shares_of(step: Callable[[], Any], ceiling: Ceiling, times: int) -> Row:
    """Of the seconds of `step` that torch's operations take: how much each kind does, and at which share of the matrix
    rate products are made."""
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    counted = counter.get_flop_counts()["Global"]
    operations = sum(count for name, count in counted.items() if kind_of(f"::{str(name).split('.')[-1]}") == "products")
    timings = compare(ceiling.ways, 9)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(times):
            step()
    seconds = dict.fromkeys([*KINDS, "others"], 0.0)
    for event in seen.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / times / 1e6
    whole = sum(seconds.values())
    rate = ceiling.operations / min(timing.seconds for timing in timings.values())
    return {**{kind: value / whole for kind, value in seconds.items()},
            "products, of the matrix rate": operations / seconds["products"] / rate}  # fmt: skip


def spent() -> list[Row]:
    model, rows = network().eval(), []
    for size in (8, 1):
        call = partial(model, *batch_of(size), iterations=ITERATIONS)
        with torch.no_grad():
            rows.append({"what": "sampling", "batch": size, **shares_of(call, Ceiling(size * 256), 20 // size)})
    rows.append({"what": "training", "batch": 8, **shares_of(training_step(model, 8), Ceiling(8 * 256), 2)})
    return rows
