"""A table so small that a test can afford it several times, and its trainings without the seconds that imports take."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fpdm.experiments import trainings
from fpdm.experiments.experiment import Experiment
from fpdm.experiments.points import Axes
from fpdm.experiments.table import Ground, Model, Table, Training
from fpdm.training.loop import Trainer
from tests.processes import Program

SIZES = {
    "hidden_size": 16, "num_heads": 2, "patch_size": 4, "batch_size": 8, "steps": 12, "warmup": 3, "log_every": 4,
    "num_pre": 1, "num_core": 1, "num_post": 1, "no_grad_max": 2, "with_grad_max": 2, "warm_share": 0.0,
}  # fmt: skip
GROUND = Ground("digits", SIZES, seeds=(0, 1), chosen_on=60, reported_on=100)
MODELS = {"looped": Model("Looped"), "plain": Model("Plain", {"network": "dit", "depth": 2})}
WAYS = {"ddim": Axes((6, 12), ("ddim",), (1, 2)), "dpm": Axes((12,), ("dpm++",), (1, 2, 3))}
TABLE = Table("Which is better?", MODELS, WAYS)
ALONE = replace(TABLE, models={"looped": MODELS["looped"]})


def experiment(out: Path, runs: Path, table: Table = TABLE, ground: Ground = GROUND, **more: Any) -> Experiment:
    settings = {"name": "tiny", "data": None, "device": "cpu", "say": lambda text: None, **more}
    return Experiment(table=table, ground=ground, out=out, runs=runs, **settings)


class Ended:
    """A process that has ended well."""

    returncode = 0

    def poll(self) -> int:
        return 0


def train_here(patch: pytest.MonkeyPatch) -> list[str]:
    """Have trainings done in this process, when they are started; the names of those that are."""
    names = list[str]()

    def started(training: Training, runs: Path, threads: int) -> Ended:
        names.append(training.name)
        Trainer(training.config, runs / training.name).run()
        return Ended()

    patch.setattr(trainings, "PAUSE", 0)
    patch.setattr(trainings, "started", started)
    return names


class Forked(Program):
    """A training of `fpdm` that does without the seconds of imports."""

    def __init__(self, words: list[str], stdout: Any, **_: Any):
        super().__init__(words[3:], Path(stdout.name))  # after python -m fpdm


def fork_trainings(patch: pytest.MonkeyPatch) -> list[Forked]:
    """Have trainings done in processes that are forked; all that were started."""
    processes = list[Forked]()

    class Kept(Forked):
        def __init__(self, *given: Any, **options: Any):
            super().__init__(*given, **options)
            processes.append(self)

    Kept.__class_getitem__ = classmethod(lambda cls, of: cls)  # as annotations have it
    patch.setattr(trainings, "PAUSE", 0.01)
    patch.setattr(trainings.subprocess, "Popen", Kept)
    return processes
