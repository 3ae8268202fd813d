"""Measure quality against compute: models x budgets x schedulers, with a report that opens in a browser.

  fpdm sweep runs/digits runs/dit8 --data digits --budgets 24,40,80,160,320,560 --out sweep

Each point is kept as JSON in OUT/points as soon as it is measured, and OUT/report.html shows all of them. Ctrl-C stops;
the same command goes on, and further models, budgets and schedulers may be added.
"""

import argparse
from pathlib import Path

from fpdm.cli.evaluate import LEAST, add_measuring_arguments, refuse_inside
from fpdm.cli.quiet import quiet_libraries
from fpdm.cli.sample import DTYPES, check_counts
from fpdm.files import check_writable
from fpdm.names import needs

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="runs or model folders, or LABEL=PATH")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for points, grids and the report")
    points = parser.add_argument_group("points")
    points.add_argument("--budgets", default="24,40,80,160,320,560", metavar="N,N...",
                        help="block passes per image (24,40,80,160,320,560)")  # fmt: skip
    points.add_argument("--schedulers", default="unipc,dpm++,ddim,ddpm", metavar="NAME,...",
                        help="(unipc,dpm++,ddim,ddpm)")  # fmt: skip
    points.add_argument("--iterations", metavar="N,N...",
                        help="per timestep; each makes a plan of every budget (default: one default plan)")  # fmt: skip
    points.add_argument("--allocations", default="constant", metavar="NAME,...",
                        help="of iterations, such as constant,linear:1,cosine:-1 (constant)")  # fmt: skip
    points.add_argument("--reuse", default="plain", metavar="NAME,...", help="of none,plain,linear,quadratic (plain)")
    points.add_argument("--solvers", default="picard", metavar="NAME,...",
                        help="such as picard,anderson:2,broyden (picard)")  # fmt: skip
    points.add_argument("--seeds", default="0", metavar="N,N...", help="of the samples (0)")
    points.add_argument("--tuned", action="store_true", help="the models' tuned plans as well")
    points.add_argument("--guidance-scale", type=float, default=1.0, metavar="S", help="1 for none (1)")
    points.add_argument("--num-images", type=int, default=1000, metavar="N", help="samples per point (1000)")
    add_measuring_arguments(parser)
    add_computing_arguments(parser)


def add_computing_arguments(parser: argparse.ArgumentParser) -> None:
    """How points are computed."""
    computing = parser.add_argument_group("computing")
    computing.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (64)")
    computing.add_argument("--processes", type=int, default=1, metavar="N", help="points at a time (1)")
    computing.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    computing.add_argument("--dtype", default="float32", metavar=DTYPES, help="of the weights")


def check_processes(options: argparse.Namespace) -> None:
    if options.processes < 1:
        raise ValueError(f"--processes is {options.processes}; it must be at least 1")


def run(options: argparse.Namespace) -> int:
    check_counts(options, LEAST)
    check_processes(options)
    budgets = numbers("--budgets", options.budgets)
    iterations = [None] if options.iterations is None else numbers("--iterations", options.iterations)
    seeds = numbers("--seeds", options.seeds, least=0)
    out = Path(options.out)
    check_writable(out)
    refuse_inside(out, options.data)
    needs("matplotlib", "plots")

    quiet_libraries()
    from fpdm.experiments.page import write_report
    from fpdm.experiments.points import Axes, Settings
    from fpdm.experiments.sweep import all_points, run_sweep

    names = [name for name in Settings.__dataclass_fields__ if hasattr(options, name)]
    settings = Settings(**{name: getattr(options, name) for name in names})
    listed = [words(text) for text in (options.schedulers, options.allocations, options.reuse, options.solvers)]
    schedulers, allocations, reuses, solvers = listed
    axes = Axes(budgets, schedulers, iterations, allocations, reuses, solvers, seeds, options.tuned)
    status = 0
    try:
        run_sweep(options.models, axes, settings, out, options.processes)
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here")
        status = INTERRUPTED
    finally:  # also where a point fails
        if points := all_points(out):
            print(f"{len(points)} points in {write_report(points, out)}")
    return status


def words(text: str) -> list[str]:
    """The words of "a,b", each once, in order."""
    return list(dict.fromkeys(text.split(",")))


def numbers(option: str, text: str, least: int = 1) -> list[int]:
    """Whole numbers of at least `least` from "24,40"; each once, in order. Raises ValueError for others."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [least - 1]
    if found[0] < least:
        raise ValueError(f"{option} is {text!r}; it must be whole numbers of at least {least}, joined by commas")
    return found
