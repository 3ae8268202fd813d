"""List runs: how far they are, whether they are training, and their last numbers.

fpdm runs                  those in runs
fpdm runs DIR              those in another folder
"""

import argparse
from pathlib import Path

COLUMNS = ("loss", "validation_loss", "grad_norm", "skipped_steps", "images_per_second")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default="runs", metavar="DIR", help="folder of runs, or a run (runs)")


def run(options: argparse.Namespace) -> int:
    from fpdm.training.listing import standings

    found = standings(Path(options.folder))
    if not found:
        print(f"no runs in {options.folder}")
        return 0
    heads = ["run", "state", "step", "of", *(name.replace("_", " ") for name in COLUMNS), "last line"]
    rows = [
        [s.name, s.state, str(s.step), str(s.steps), *(shown(s.last.get(name)) for name in COLUMNS), ago(s.age)]
        for s in found
    ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
    return 0


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def ago(seconds: float | None) -> str:
    """How long ago, in the largest unit that fits."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
