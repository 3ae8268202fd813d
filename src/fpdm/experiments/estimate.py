"""What an experiment has to do, and how long that will take on this machine: a few steps of each kind are timed."""

import io
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fpdm.drawing import Choices
from fpdm.experiments.experiment import AT_ONCE, Experiment, untuned
from fpdm.experiments.points import distinct
from fpdm.experiments.table import WHOLE, Part, Training
from fpdm.experiments.trainings import is_trained
from fpdm.machine import threads_each
from fpdm.models import Denoiser
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.sampling import measure_seconds, solver_of
from fpdm.training.loop import Trainer

WARM, TIMED = 2, 10  # steps
TUNING_DRAWS = 25  # of as many samples as a plan is chosen on, that a tuning makes for a budget, about


@dataclass(frozen=True)
class Needed:
    """Seconds of one process."""

    training: float
    choosing: float
    reporting: float

    @property
    def total(self) -> float:
        return self.training + self.choosing + self.reporting


def estimate(experiment: Experiment, part: Part = WHOLE) -> Iterator[str]:
    """A line per model, and the sum. What is finished is not counted, except for points; measuring samples is not."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_each(experiment.processes))
    try:
        total = 0.0
        yield f"{'hours of one process':24} {'trainings':>16} {'choosing plans':>16} {'reporting':>12}"
        for label in experiment.table.models:
            trainings = [t for t in experiment.trainings(part) if t.label == label]
            if not trainings:
                continue
            missing = [t for t in trainings if not is_trained(t, experiment.runs)]
            needed = needed_by(experiment, part, trainings, missing)
            total += needed.total
            count = f"{needed.training / 3600:.2f} ({len(missing)})"
            yield f"{label:24} {count:>16} {needed.choosing / 3600:>16.2f} {needed.reporting / 3600:>12.2f}"
    finally:
        torch.set_num_threads(before)
    yield (
        f"about {total / 3600 / experiment.processes:.1f} hours with {experiment.processes} processes at a time, "
        "if each gets what it had here, and without the measuring of the samples"
    )


def needed_by(experiment: Experiment, part: Part, trainings: list[Training], missing: list[Training]) -> Needed:
    """The seconds that a model takes."""
    per_step, pipe = time_steps(trainings[0])
    training_time = sum(per_step * t.config.optimizer.steps for t in missing)
    choosing = reporting = 0.0
    seconds: dict[str, float] = {}
    label, first = trainings[0].label, experiment.ground.seeds[0]
    chosen_on = experiment.ground.chosen_on if any(t.seed == first for t in trainings) else 0
    for budget in filter(lambda budget: part.has(budget=budget), experiment.table.budgets):
        most: dict[str, float] = {}  # seconds of each way's dearest plan
        for way, axes in experiment.table.ways.items():
            if not part.has(way=way) or budget not in axes.budgets:
                continue
            if axes.tuned:
                plan = Choices(budget, scheduler=axes.schedulers[0])
                own, draws = [drawing_seconds(pipe.transformer, plan, pipe, seconds)], TUNING_DRAWS + 1
            else:
                points = distinct("", "", "", pipe, [w for w in untuned(axes, pipe) if w[0] == budget], [])
                own, draws = [drawing_seconds(pipe.transformer, p.choices, pipe, seconds) for p in points], 1
            if own:
                most[way] = max(own)
            if (way, budget) not in experiment.kept_of(label, first):
                choosing += chosen_on * draws * sum(own)
        for training in trainings:
            kept = {way for way, b in experiment.kept_of(label, training.seed) if b == budget}
            reporting += experiment.ground.reported_on * sum(most[way] for way in most.keys() - kept)
    return Needed(training_time, choosing, reporting)


def drawing_seconds(model: Denoiser, choices: Choices, pipe: FixedPointDiTPipeline, known: dict[str, float]) -> float:
    """Seconds per image. `known` keeps what was timed, by solver."""
    plan = choices.plan(pipe)
    if choices.solver not in known:
        timed = measure_seconds(model, AT_ONCE, solver_of(choices.solver))
        known[choices.solver] = timed.fixed
        known[choices.solver + " per iteration"] = timed.per_iteration
    iterations = sum(n or 0 for n in plan.iterations)
    fixed, per_iteration = known[choices.solver], known[choices.solver + " per iteration"]
    return (plan.num_steps * fixed + iterations * per_iteration) / AT_ONCE


def time_steps(training: Training) -> tuple[float, FixedPointDiTPipeline]:
    """Seconds per step of a training, from a few; and a pipeline of its kind, hardly trained."""
    short = {"log_every": 1, "checkpoint_every": 10**6, "sample_every": 10**6, "validate_every": 10**6}
    with TemporaryDirectory() as folder:
        times = list[float]()
        with redirect_stderr(io.StringIO()):  # the bars
            trainer = Trainer(training.config.with_fields(**short, steps=WARM + TIMED), Path(folder) / "timed")
            trainer.pace.stepped = lambda: times.append(time.perf_counter())  # type: ignore[method-assign]
            if trainer.run() == "interrupted":
                raise KeyboardInterrupt
        pipe = FixedPointDiTPipeline.from_pretrained(trainer.dir.pipeline)
    return (times[-1] - times[WARM - 1]) / TIMED, pipe
