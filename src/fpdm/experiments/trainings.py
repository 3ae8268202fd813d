"""The trainings of a table: each a process of its own, several at a time, gone on with wherever they were stopped."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fpdm.experiments.table import Training
from fpdm.files import read_json
from fpdm.machine import threads_each
from fpdm.training.checkpoints import all_steps
from fpdm.training.config import Config, differences
from fpdm.training.listing import numbers, standing
from fpdm.training.rundir import PARTIAL

PAUSE = 1.0  # seconds between looks


def train_missing(
    trainings: list[Training],
    runs: Path,
    processes: int,
    say: Callable[[str], None] = print,
    threads: int | None = None,
) -> None:
    """Do what is missing of the trainings, in folders of their names in `runs`, so many at a time.

    threads  of each process; by default they share those of this one

    An interrupt stops all of them, saved. Raises ValueError before anything starts for what `check_runs` refuses, and
    ChildProcessError for a training that fails, once the others that had begun are stopped and saved.
    """
    check_runs(trainings, runs)
    missing = [training for training in trainings if not is_trained(training, runs)]
    if len(missing) < len(trainings):
        say(f"{len(trainings) - len(missing)} of {len(trainings)} trainings are there")
    if not missing:
        return
    threads = threads or threads_each(processes)
    waiting, working = list(missing), list[tuple[Training, subprocess.Popen[bytes]]]()
    total, done = sum(map(steps_of, missing)), sum(steps_kept(training, runs) for training in missing)
    with tqdm(total=total, initial=done, unit="step", mininterval=0.5, desc="training") as bar:
        try:
            while waiting or working:
                while waiting and len(working) < processes:
                    training = waiting.pop(0)
                    working.append((training, started(training, runs, threads)))
                time.sleep(PAUSE)
                for training, process in list(working):
                    if process.poll() is not None:
                        working.remove((training, process))
                        check_ended(training, process, runs)
                        bar.write(f"{training.name} is trained")
                bar.n = sum(steps_done(training, runs) for training in missing)
                bar.refresh()
        finally:
            stop([process for _, process in working])


def is_trained(training: Training, runs: Path) -> bool:
    folder = runs / training.name
    return (folder / "config.json").is_file() and standing(folder).state == "finished"


def steps_of(training: Training) -> int:
    return training.config.optimizer.steps


def steps_kept(training: Training, runs: Path) -> int:
    """Where it goes on: the log of a process that was killed says more, which is done once more."""
    return max(all_steps(runs / training.name / "checkpoints"), default=0)


def steps_done(training: Training, runs: Path) -> int:
    """By the log, which lags behind a little, or by what was saved, if that was since."""
    logged = int(numbers(runs / training.name / "log.jsonl").get("step", 0))
    return max(logged, steps_kept(training, runs))


def check_runs(trainings: list[Training], runs: Path, fingerprint: str | None = None) -> None:
    """Raises ValueError if a folder of one of the trainings' names holds another run, or one that is at work.

    fingerprint  of the images, if they are to be compared, too
    """
    for training in trainings:
        path = runs / training.name / "config.json"
        if not path.is_file():
            continue
        old = read_json(path)
        changed = {name: f"{name} was {was!r}, is {now!r}"
                   for name, (was, now) in differences(old, training.config.to_dict()).items()}  # fmt: skip
        if fingerprint not in (None, old.get("data_fingerprint")):
            changed["data"] = "the images are others"
        if standing(path.parent).state == "training":
            raise ValueError(f"{path.parent} is being trained by another command: let that end, or stop it")
        if changed:
            listed = "; ".join(changed.values())
            raise ValueError(f"{path.parent} holds another run than this table's: {listed}. Choose another --runs-dir")


def started(training: Training, runs: Path, threads: int) -> "subprocess.Popen[bytes]":
    """The process of a training. What it prints goes to a file in `runs`, see `output_of`."""
    runs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fpdm", "train", *training.words, "--name", training.name, "--runs-dir", str(runs)]
    with output_of(training, runs).open("ab") as output:
        output.write(f"$ fpdm {shlex.join(command[3:])}\n".encode())
        output.flush()
        # In a session of its own: a Ctrl-C is for us to pass on, once.
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip


def output_of(training: Training, runs: Path) -> Path:
    return runs / f"{training.name}.out"


def check_ended(training: Training, process: "subprocess.Popen[Any]", runs: Path) -> None:
    if process.returncode == 0 and is_trained(training, runs):
        return
    tail = output_of(training, runs).read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-5:]
    raise ChildProcessError(
        f"the training {training.name} ended with status {process.returncode}; the last of what it said, in "
        f"{output_of(training, runs)}:\n  " + "\n  ".join(tail) + "\nThe same command goes on with it."
    )


def stop(processes: "list[subprocess.Popen[Any]]") -> None:
    """Have them save and end."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def written(training: Training, runs: Path) -> dict[str, Any]:
    """What is kept of a finished training."""
    config = training.config
    logged = measured_steps(runs / training.name)
    return {
        "model": training.label,
        "seed": training.seed,
        "command": "fpdm train " + shlex.join(portable(training).words),
        "steps": config.optimizer.steps,
        "batch_size": config.optimizer.batch_size,
        "loss": logged[-1]["loss"] if logged else None,
        "seconds": seconds_of(runs / training.name, config),
    }


def seconds_of(run: Path, config: Config) -> float:
    """How long a run trained, by the images per second of its log: all its parts, but for what they did over again."""
    images = config.run.log_every * config.optimizer.batch_size
    return round(sum(images / line["images_per_second"] for line in measured_steps(run)), 1)


def measured_steps(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that were timed, all of as many steps."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "images_per_second" in line and PARTIAL not in line]


def portable(training: Training) -> Training:
    """The training without where its data are."""
    kept = {name: "DATA" if name == "data" else value for name, value in training.changes.items()}
    return replace(training, changes=kept)
