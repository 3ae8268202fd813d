"""Train on handwritten digits, then draw the same images at three compute budgets: a few minutes on two cores.

Writes demo.png: a row of images per budget, and how far each fixed point was solved.
"""

import argparse
from pathlib import Path

from fpdm.cli.quiet import quiet_libraries
from fpdm.files import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="folder for the run and the picture (runs/demo)"
    )
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: the digits recipe's)")


def run(options: argparse.Namespace) -> int:
    out = Path(options.out)
    check_writable(out)
    quiet_libraries()
    from fpdm.experiments.demo import run_demo

    return run_demo(out, options.steps)
