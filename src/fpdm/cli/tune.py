"""Find, for a trained model, the plan with the best images at each budget, and keep it with the model.

  fpdm tune runs/digits --data digits --budget 40,80,160

measures how the model's predictions converge, derives plans from it, and compares a short-list by the distance of their
images to the data. `fpdm sample runs/digits --budget 80` then uses what was found. Ctrl-C stops; the same command goes
on.
"""

import argparse
from pathlib import Path

from fpdm.cli.evaluate import LEAST, add_measuring_arguments, refuse_inside
from fpdm.cli.quiet import quiet_libraries
from fpdm.cli.sample import check_counts
from fpdm.cli.sweep import add_computing_arguments, check_processes, numbers, words
from fpdm.files import check_writable
from fpdm.names import needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run or model folder, or LABEL=PATH")
    parser.add_argument("--budget", default="40,80,160", metavar="N,N...", help="block passes per image (40,80,160)")
    parser.add_argument("--out", metavar="DIR", help="folder for what is measured (default: tune, in the model's run)")
    parser.add_argument("--schedulers", default="dpm++,unipc,ddpm", metavar="NAME,...", help="(dpm++,unipc,ddpm)")
    parser.add_argument("--num-images", type=int, default=1000, metavar="N", help="in the last round (1000)")
    parser.add_argument("--seed", type=int, default=1, help="of the samples: not one to report results of (1)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, metavar="S", help="1 for none (1)")
    add_measuring_arguments(parser)
    add_computing_arguments(parser)


def run(options: argparse.Namespace) -> int:
    check_counts(options, LEAST)
    budgets, schedulers = numbers("--budget", options.budget), words(options.schedulers)
    check_processes(options)
    named = Path(options.model)
    path = named if named.exists() else Path(options.model.partition("=")[2] or options.model)
    out = Path(options.out) if options.out else path / "tune"
    check_writable(out)
    refuse_inside(out, options.data)
    needs("matplotlib", "plots")

    quiet_libraries()
    from fpdm.experiments.page import write_report
    from fpdm.experiments.points import Settings
    from fpdm.experiments.sweep import all_points
    from fpdm.experiments.tune import tune_model

    names = [name for name in Settings.__dataclass_fields__ if hasattr(options, name)]
    settings = Settings(**{name: getattr(options, name) for name in names})
    try:
        plans = tune_model(options.model, budgets, schedulers, settings, out, options.seed, options.processes)
    finally:
        for folder in sorted(out.glob("round-*")):
            if points := all_points(folder):
                write_report(points, folder)
    for plan in plans:
        found = plan.found
        print(
            f"{plan.budget:6} block passes: {len(plan.iterations)} timesteps, {plan.scheduler}, reuse {plan.reuse}, "
            f"{plan.solver}: {found['distance']} {found['value']:.3g}; the best by hand, {found['plan_by_hand']}, has "
            f"{found['by_hand']:.3g}"
        )
    print(f"kept with the model; all that was measured is in {out}")
    return 0
