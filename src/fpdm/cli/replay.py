"""Look at one step of a run again: its images, their timesteps, and the loss of each.

  fpdm replay runs/mine --step 4711

The step's images, noise and iterations are those of the training; the weights are the newest checkpoint's up to there,
so the losses are near those of the step, not the same. For finding out why a gradient was not finite.
"""

import argparse
from pathlib import Path

from fpdm.cli.quiet import quiet_libraries
from fpdm.files import check_writable, write_aside

MOST = 20  # rows shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--step",
        type=int,
        required=True,
        metavar="N",
        help="which step: the first is 0, and the log's line 50 comes after 49",
    )
    parser.add_argument("--data", metavar="PATH", help="where the images are now, if they have moved")
    parser.add_argument("--out", metavar="FILE", help="the images as a PNG grid (default: RUN/replay-N.png)")


def run(options: argparse.Namespace) -> int:
    folder = Path(options.run_folder)
    out = Path(options.out) if options.out else folder / f"replay-{options.step}.png"
    check_writable(out.parent)
    quiet_libraries()
    from fpdm.imaging import grid
    from fpdm.training.replay import replay

    found = replay(folder, options.step, options.data)
    with_weights = "at the start" if found.weights is None else f"of the checkpoint of step {found.weights}"
    older = options.step - (found.weights or 0)
    apart = f", {older} step{'s' * (older > 1)} older: the losses are not the run's own" if older else ""
    print(f"step {options.step}, with the weights {with_weights}{apart}; worst first")
    print(f"{'slot':>6} {'class':>6} {'timestep':>9} {'loss':>10} {'mse':>10}")
    rows = sorted(found.rows, key=lambda row: -row.loss if row.loss == row.loss else float("-inf"))
    for row in rows[:MOST]:
        print(f"{row.slot:>6} {row.label:>6} {row.timestep:>9} {row.loss:>10.4g} {row.mse:>10.4g}")
    if len(rows) > MOST:
        print(f"and {len(rows) - MOST} more")
    for name in found.broken:
        print(f"cannot be read, and another was taken in its place: {name}")
    write_aside(out, lambda aside: grid(found.images, columns=10).save(aside, format="png"))
    print(f"its images, in the order of their slots: {out}")
    return 0
