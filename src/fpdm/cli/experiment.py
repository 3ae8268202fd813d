"""Train, sample and measure all that a table of docs/reproduction.md takes, or what is missing of it.

  fpdm experiment main                                    on the digits, which need no data
  fpdm experiment methods --processes 2
  fpdm experiment main --on fashion-mnist --data DIR
  fpdm experiment methods --seeds 1,2 --kept FILE         joined to a result.json that has seed 0
  fpdm experiment main --dry-run                          how long it will take on this machine

Trainings are kept in RUNS-DIR and shared by the tables; a table's plans, points and result in OUT/NAME-GROUND. Ctrl-C
stops; the same command goes on.
"""

import argparse
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fpdm.cli.quiet import quiet_libraries
from fpdm.cli.sweep import INTERRUPTED, numbers, words
from fpdm.files import check_writable, read_json
from fpdm.names import needs
from fpdm.signals import handled_by

Value = TypeVar("Value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="NAME", help="main, operations, form, methods, depths, iterations or spending")
    parser.add_argument("--on", default="digits", metavar="GROUND", help="digits, fashion-mnist or cifar10 (digits)")
    parser.add_argument("--data", metavar="DIR", help="the ground's data, where they are not in the package")
    parts = parser.add_argument_group("a part of the table, which later ones are added to")
    parts.add_argument("--models", metavar="LABEL,...", help="some rows (all)")
    parts.add_argument("--seeds", metavar="N,N...", help="some trainings of each (0,1,2; 0 on fashion-mnist)")
    parts.add_argument("--ways", metavar="NAME,...", help="some ways to draw, such as UniPC (all)")
    parts.add_argument("--budgets", metavar="N,N...", help="some budgets (all)")
    parser.add_argument("--kept", metavar="FILE", help="result of this table from elsewhere: what it has is not redone")
    parser.add_argument("--out", default="experiments", metavar="DIR", help="folder of all tables (experiments)")
    parser.add_argument("--runs-dir", metavar="DIR", help="folder of the trainings (OUT/runs-GROUND)")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="trainings or points at a time (cores, or 1 on a GPU)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    parser.add_argument("--dry-run", action="store_true", help="print what is to be done, and the hours it will take")


def run(options: argparse.Namespace) -> int:
    out = Path(options.out) / f"{options.table}-{options.on}"
    runs = Path(options.runs_dir or Path(options.out) / f"runs-{options.on}")
    check_writable(out)
    check_writable(runs)
    needs("matplotlib", "plots")

    quiet_libraries()
    from fpdm.devices import pick_device
    from fpdm.experiments.catalog import ground, table
    from fpdm.experiments.estimate import estimate
    from fpdm.experiments.experiment import RESULT, Experiment
    from fpdm.experiments.show import as_text, write_page
    from fpdm.experiments.table import Part
    from fpdm.machine import cores

    wanted, on = table(options.table), ground(options.on)
    part = Part(
        models=given(options.models, words),
        seeds=given(options.seeds, lambda text: numbers("--seeds", text, least=0)),
        ways=given(options.ways, words),
        budgets=given(options.budgets, lambda text: numbers("--budgets", text)),
    )
    part.check(wanted, on)
    if on.data and not options.data:
        raise ValueError(f"--data is needed on {options.on}: {on.data}")
    if options.data and not on.data:
        raise ValueError(f"--data has no meaning on {options.on}, whose images are in the package: leave it out")
    device = pick_device(options.device)
    usual = cores() if device == "cpu" else 1
    processes = usual if options.processes is None else options.processes
    if processes < 1:
        raise ValueError(f"--processes is {processes}; it must be at least 1")
    data = str(Path(options.data).resolve()) if options.data else None
    kept = kept_result(options.kept)
    experiment = Experiment(options.table, wanted, on, data, out, runs, processes, device, kept=kept)
    if options.dry_run:
        experiment.check(part)
        for line in estimate(experiment, part):
            print(line, flush=True)
        return 0
    status = 0
    try:
        with handled_by(signal.default_int_handler, signal.SIGTERM):  # trainings are to be told, and to save
            experiment.run(part)
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here")
        status = INTERRUPTED
    result = read_json(out / RESULT) if (out / RESULT).is_file() else {"points": []}
    if result["points"]:
        print(as_text(result))
        print(f"\n{write_page(result, out)} shows it; {out / RESULT} keeps it")
    return status


def kept_result(path: str | None) -> dict[str, Any] | None:
    """Raises ValueError for a file that is not there, or is no result."""
    if path is None:
        return None
    try:
        found = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"--kept {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not {"table", "trainings", "points"} <= found.keys():
        raise ValueError(f"--kept {path} is no result of a table: name a result.json that this command wrote")
    return found


def given(text: str | None, read: Callable[[str], Value]) -> Value | None:
    """What an option says, None if it was not given."""
    return None if text is None else read(text)
