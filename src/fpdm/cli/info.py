"""Show what a training would be, before it starts: network, cost of a step and of samples, memory. No data is read.

  fpdm info digits
  fpdm info images --image-size 64 --model S/4 --classes 10
  fpdm info images --channels 4 --classes 1000 --model XL/2 --image-size 32 --batch-size 32 --mixed-precision bf16

It takes what `fpdm train` takes. The number of classes, of which the data is not asked, comes from --classes. Memory is
that of one process.
"""

import argparse
import textwrap
from typing import TYPE_CHECKING

from fpdm.cli import train
from fpdm.cli.quiet import quiet_libraries
from fpdm.training.config import FIXED_POINT_ONLY, Config

if TYPE_CHECKING:
    from fpdm.data import Source
    from fpdm.fixedpoint import Solve
    from fpdm.models import Denoiser
    from fpdm.training.memory import Memory

BUDGETS = (40, 80, 160, 560)
COLUMNS = ("parameters", "gradients", "optimizer", "ema", "activations", "peak")

add_arguments = train.add_arguments


def run(options: argparse.Namespace) -> int:
    config = train.resolve(options)
    quiet_libraries()
    from fpdm.training.build import open_source
    from fpdm.training.memory import network, one_step, solves, stand_in

    one_step(config)  # refuses what only the last table would
    source = open_source(config.data) if config.data.source == "digits" else stand_in(config.data)
    model = network(config, source)
    steps = solves(config, model)
    print_network(config, model)
    print_steps(config, model, steps)
    print_samples(model)
    print_memory(config, source, steps)
    print_settings(config)
    return 0


def print_settings(config: Config) -> None:
    """All that the recipe and the options say, but for the network, and what has no effect on an explicit one."""
    without_effect = FIXED_POINT_ONLY if config.model.network == "dit" else ()
    print("\nsettings, each an option of fpdm train")
    for group, values in config.to_dict().items():
        if group != "model":
            told = [f"{name.replace('_', '-')} {v}" for name, v in values.items() if name not in without_effect]
            print(textwrap.fill(", ".join(told), 118, initial_indent=f"{group:10} ", subsequent_indent=" " * 11,
                                break_on_hyphens=False))  # fmt: skip


def print_network(config: Config, model: "Denoiser") -> None:
    sizes, side = model.config, model.config.sample_size
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    if "depth" in sizes:
        blocks = f"{sizes.depth} blocks"
    else:
        blocks = f"{sizes.num_pre} + {sizes.num_core} + {sizes.num_post} blocks, those in the middle iterated"
    classes = f"{sizes.num_classes} classes" if sizes.num_classes else "no classes"
    print(f"{type(model).__name__}, {parameters:.2f} M parameters: {blocks}, {sizes.hidden_size} wide")
    print(f"{side} x {side} x {sizes.in_channels} in patches of {sizes.patch_size}: {(side // sizes.patch_size) ** 2} "
          f"tokens; {classes}")  # fmt: skip
    if config.data.conditional and config.data.classes is None and not sizes.num_classes:
        print("--classes tells how many classes the data has")


def print_steps(config: Config, model: "Denoiser", steps: "dict[str, Solve | None]") -> None:
    """Block passes and operations of a training step by its iterations; and on average where some start warm."""
    from fpdm.training.course import differentiated, make_courses, mean_operations, operations

    print(f"\n{'a training step, per image':28} {'iterations':>16} {'block passes':>14} {'operations':>12}")
    warm = config.gradient.warm_share
    for name, solve in steps.items():
        name = f"{name}, cold" if warm else name
        if solve is None:
            iterations, passes = "-", model.passes()
        else:
            some = differentiated(solve)
            iterations, passes = f"{some[0] - 1} and {len(some)}", model.passes(some[-1])
        print(f"{name:28} {iterations:>16} {passes:>14} {operations(model, solve):>12.3g}")
    if warm:
        average = mean_operations(model, make_courses(config.gradient, model.config.num_core))
        print(f"{f'average, a share of {warm:g} warm':28} {'':>16} {'':>14} {average:>12.3g}")
    if None not in steps.values():
        print("iterations without and with gradient; block passes forward, operations backward too")


def print_samples(model: "Denoiser") -> None:
    """What `fpdm sample` does with a few budgets where no plan is tuned; those that are too small are left out."""
    from fpdm.cli.plan import spread
    from fpdm.sampling import cost_of, make_plan, operations_of, total

    cost = cost_of(model)
    print(f"\n{'a sample':28} {'timesteps':>16} {'iterations':>14} {'operations':>12}")
    for budget in BUDGETS:
        if budget >= cost.passes(0 if cost.per_iteration == 0 else 1):
            plan = make_plan(cost, budget=budget)
            name = f"{plan.planned} block passes"
            counted = total(operations_of(model), plan)
            print(f"{name:28} {plan.num_steps:>16} {spread(plan.iterations):>14} {counted:>12.3g}")


def print_memory(config: Config, source: "Source", steps: "dict[str, Solve | None]") -> None:
    """A row of bytes for each number of iterations, without and with gradient checkpointing."""
    from fpdm.training.memory import training_memory

    images, parts = config.optimizer.batch_size, config.optimizer.accumulation
    precision = "float32" if config.run.mixed_precision == "no" else "bf16 autocast"
    shared = f" in {parts} parts" if parts > 1 else ""
    print(f"\n{f'memory, {images} images{shared}':28} " + " ".join(f"{name:>11}" for name in COLUMNS))
    for name, solve in steps.items():
        for checkpointing in (False, True):
            memory = training_memory(config.with_fields(checkpointing=checkpointing), source, solve)
            print(f"{name + (', checkpointing' if checkpointing else ''):28} {in_columns(memory)}", flush=True)
    print(f"in MB, {precision}; the peak is the most at any one time: gradients come as activations go")


def in_columns(memory: "Memory") -> str:
    return " ".join(f"{getattr(memory, name) / 1e6:>11.1f}" for name in COLUMNS)
