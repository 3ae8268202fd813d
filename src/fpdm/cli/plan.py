"""Show what a budget buys, before anything runs: timesteps, iterations, block passes, operations, predicted seconds.

  fpdm plan --budget 560                                 a network of one block before, in and after the fixed point
  fpdm plan --budget 560 --model runs/digits             with operations and seconds on this machine, and tuned plans
  fpdm plan --budget 160 --steps 40 --allocation linear:1 --plot plan.png

A budget alone lists plans from many timesteps of few iterations (smoothing) to few of many; with --steps, --iterations
or --allocation, the one plan that follows is shown timestep by timestep.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpdm.cli.quiet import quiet_libraries
from fpdm.cli.sample import DEFAULT_BUDGET, DTYPES, parse_iterations
from fpdm.files import check_writable, model_folder, write_aside
from fpdm.names import needs, unknown

if TYPE_CHECKING:
    from fpdm.pipeline import FixedPointDiTPipeline
    from fpdm.sampling import Plan

ITERATIONS = (1, 2, 3, 4, 6, 8, 12, 16, 26)  # of the plans that a budget alone lists
ALLOCATED = ("linear:1", "linear:-1")  # and how else the middle one may be shared out
HEUN_CALLS = range(1, 2000, 2)  # where no model tells its noise schedule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="a run, a model folder, or a name on the hub")
    parser.add_argument("--budget", type=int, metavar="PASSES", help="transformer block passes per image (160)")
    parser.add_argument("--steps", type=int, metavar="T", help="timesteps")
    parser.add_argument("--iterations", metavar="N[,N...]", help="of the fixed point: at all, or at each timestep")
    parser.add_argument("--allocation", metavar="{constant,linear:S,cosine:S}", help="from noise to image (constant)")
    parser.add_argument("--scheduler", metavar="NAME", help="sampling method (default: the model's)")
    parser.add_argument("--plot", metavar="FILE", help="also draw the iterations per timestep into a PNG file")
    network = parser.add_argument_group("network, where there is no --model")
    network.add_argument("--pre", type=int, metavar="N", help="blocks before the fixed point (1)")
    network.add_argument("--core", type=int, metavar="K", help="blocks in it (1)")
    network.add_argument("--post", type=int, metavar="N", help="blocks after it (1)")
    timing = parser.add_argument_group("prediction of seconds")
    timing.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (64)")
    timing.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    timing.add_argument("--dtype", default="float32", metavar=DTYPES, help="of the weights")


def run(options: argparse.Namespace) -> int:
    if options.plot:
        needs("matplotlib", "plots")
    blocks = {name: getattr(options, name) for name in ("pre", "core", "post")}
    if options.model and (given := [f"--{name}" for name, count in blocks.items() if count is not None]):
        raise ValueError(f"{options.model} has its blocks: leave {', '.join(given)} out, or --model")
    for name, count in blocks.items():
        setattr(options, name, 1 if count is None else count)
    if min(options.core, options.batch_size) < 1 or min(options.pre, options.post) < 0:
        raise ValueError("--core and --batch-size must be at least 1, --pre and --post at least 0")
    if options.plot:
        check_writable(Path(options.plot).parent)
    folder = None if options.model is None else model_folder(options.model)
    quiet_libraries()
    from fpdm.drawing import load_pipeline

    pipe = None if folder is None else load_pipeline(folder, options.device, options.dtype)
    one = any(value is not None for value in (options.steps, options.iterations, options.allocation))
    plans, solvers = ({"": planned(options, pipe)}, {}) if one else listed(options, pipe)
    print_table(plans, solvers, pipe, options.batch_size)
    if one:
        plan = plans[""]
        print("iterations from noise to image: " + ", ".join(str(n) for n in plan.iterations))
    if options.plot:
        Path(options.plot).parent.mkdir(parents=True, exist_ok=True)
        write_aside(Path(options.plot), lambda aside: draw(plans, aside))
        print(f"drawn: {options.plot}")
    return 0


def planned(options: argparse.Namespace, pipe: "FixedPointDiTPipeline | None", **other: Any) -> "Plan":
    """The plan that follows from the options, with others in their place."""
    from fpdm.sampling import EVERY_CALL, SCHEDULERS, Cost, make_plan

    if options.scheduler is not None and options.scheduler not in SCHEDULERS:
        raise ValueError(unknown("scheduler", options.scheduler, SCHEDULERS))
    choices = {
        "budget": options.budget,
        "num_steps": options.steps,
        "iterations": parse_iterations(options.iterations),
        "allocation": options.allocation or "constant",
        **other,
    }
    if pipe is not None:
        return pipe.plan(scheduler=options.scheduler, num_inference_steps=choices.pop("num_steps"), **choices)
    calls = HEUN_CALLS if options.scheduler == "heun" else EVERY_CALL
    return make_plan(Cost(options.pre + options.post, options.core), calls=calls, **choices)


def listed(
    options: argparse.Namespace, pipe: "FixedPointDiTPipeline | None"
) -> tuple[dict[str, "Plan"], dict[str, str]]:
    """What a budget buys: plans of different numbers of iterations, ramps of one of them, and the tuned plan that
    `fpdm sample` would take. And the solvers of those that have one of their own."""
    from fpdm.drawing import Choices
    from fpdm.sampling import Plan, plan_for

    budget = DEFAULT_BUDGET if options.budget is None else options.budget
    plans: dict[str, Plan] = {}
    solvers: dict[str, str] = {}
    for count in ITERATIONS:
        try:
            plan = planned(options, pipe, budget=budget, iterations=count)
        except ValueError:
            continue
        plans[f"{spread(plan.iterations)} each"] = plan
    if plans:
        steps = list(plans.values())[len(plans) // 2].num_steps
        for allocation in ALLOCATED:
            plans[allocation] = planned(options, pipe, budget=budget, num_steps=steps, allocation=allocation)
    else:  # an explicit network, or a budget that is too small, which is told
        plans[""] = planned(options, pipe, budget=budget)
    own = () if pipe is None else pipe.tuned_plans
    tuned = plan_for(own, {"budget": budget, "scheduler": options.scheduler})
    if pipe is not None and tuned is not None:
        chosen = Choices(**pipe.tuned(budget))
        for_budget = "" if tuned.budget == budget else f" for {tuned.budget}"
        name = f"tuned{for_budget}: {tuned.scheduler}, reuse {tuned.reuse}, {tuned.solver}"
        plans[name], solvers[name] = chosen.plan(pipe), tuned.solver
    return plans, solvers


def print_table(
    plans: dict[str, "Plan"], solvers: dict[str, str], pipe: "FixedPointDiTPipeline | None", batch_size: int
) -> None:
    from fpdm.sampling import measure_seconds, operations_of, solver_of, total

    width = max(10, *map(len, plans))
    head = f"{'plan':{width}} {'timesteps':>9} {'iterations':>11} {'passes':>7}"
    operations, seconds = None, {}
    if pipe is not None:
        operations = operations_of(pipe.transformer)
        seconds = {
            name: measure_seconds(pipe.transformer, batch_size, solver_of(name))
            for name in ("picard", *solvers.values())
        }
        head += f" {'operations':>11} {'s / image':>10}"
    print(head)
    for name, plan in plans.items():
        line = f"{name:{width}} {plan.num_steps:>9} {spread(plan.iterations):>11} {plan.planned:>7}"
        if operations is not None:
            taken = seconds[solvers.get(name, "picard")].of(plan)
            line += f" {total(operations, plan):>11.3g} {taken:>10.3g}"
        print(line)
    if pipe is not None:
        print(f"seconds as {batch_size} images at a time take on this machine ({pipe.device}), without guidance")


def spread(iterations: Sequence[int | None]) -> str:
    known = [n for n in iterations if n is not None]
    if not known:
        return "-"
    return f"{min(known)}" if min(known) == max(known) else f"{min(known)} to {max(known)}"


def draw(plans: dict[str, "Plan"], path: Path) -> None:
    """Iterations per timestep of each plan, over the way from noise to image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 4.5), layout="constrained")
    colours = plt.get_cmap("viridis")
    for i, (name, plan) in enumerate(plans.items()):
        steps = plan.num_steps
        places = [(step + 0.5) / steps for step in range(steps)]
        label = f"{name + ': ' if name else ''}{steps} timesteps, {plan.planned} passes"
        axis.plot(places, [n or 0 for n in plan.iterations], marker=".", linewidth=1, label=label,
                  color=colours(i / max(1, len(plans) - 1) * 0.9))  # fmt: skip
    axis.set(xlabel="from noise (0) to image (1)", ylabel="iterations")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)
