"""Train, sample and measure all that a table of docs/reproduction.md takes, or what is missing of it.

  fpdm experiment main                                    on the digits, which need no data
  fpdm experiment methods --processes 2
  fpdm experiment main --on fashion-mnist --data DIR
  fpdm experiment main --dry-run                          how long it will take on this machine

Trainings are kept in RUNS-DIR and shared by the tables; a table's plans, points and result in OUT/NAME-GROUND. Ctrl-C
stops; the same command goes on.
"""

import argparse
import os
from pathlib import Path

from fpdm.cli.quiet import quiet_libraries
from fpdm.cli.sweep import numbers, words
from fpdm.files import check_writable
from fpdm.names import needs, unknown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="NAME", help="main, operations, form, methods, depths or spending")
    parser.add_argument("--on", default="digits", metavar="GROUND", help="digits, fashion-mnist or cifar10 (digits)")
    parser.add_argument("--data", metavar="DIR", help="the ground's data, where they are not in the package")
    parser.add_argument("--models", metavar="LABEL,...", help="some rows only (all)")
    parser.add_argument(
        "--seeds", metavar="N,N...", help="some trainings only (the ground's, of which there are 1 or 3)"
    )
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
    needs("matplotlib", "plots")

    quiet_libraries()
    from fpdm.devices import pick_device
    from fpdm.experiments.catalog import ground, table
    from fpdm.experiments.estimate import estimate
    from fpdm.experiments.experiment import Experiment
    from fpdm.experiments.show import as_text, write_page

    wanted, on = table(options.table), ground(options.on)
    labels = words(options.models) if options.models else list(wanted.models)
    for label in labels:
        if label not in wanted.models:
            raise ValueError(unknown("model", label, wanted.models))
    seeds = numbers("--seeds", options.seeds, least=0) if options.seeds else list(on.seeds)
    if strangers := [seed for seed in seeds if seed not in on.seeds]:
        raise ValueError(f"--seeds names {strangers}; the trainings on {options.on} have {list(on.seeds)}")
    if on.data and not options.data:
        raise ValueError(f"--data is needed on {options.on}: {on.data}")
    if options.data and not on.data:
        raise ValueError(f"--data has no meaning on {options.on}, whose images are in the package: leave it out")
    device = pick_device(options.device)
    processes = options.processes or (os.cpu_count() or 1 if device == "cpu" else 1)
    if processes < 1:
        raise ValueError(f"--processes is {processes}; it must be at least 1")
    data = str(Path(options.data).resolve()) if options.data else None
    experiment = Experiment(options.table, wanted, on, data, out, runs, processes, device)
    if options.dry_run:
        for line in estimate(experiment, labels, seeds):
            print(line, flush=True)
        return 0
    result = experiment.run(labels, seeds)
    print(as_text(result))
    print(f"\n{write_page(result, out)} shows it; {out / 'result.json'} keeps it")
    return 0
