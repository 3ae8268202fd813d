"""A table of results: train what is missing of its models, choose each one's plans, measure them, and sum up.

    OUT/choose/            a sweep: the plans among which each model's are chosen
    OUT/chosen/MODEL.json  the plan of each way and budget, and what the others had
    OUT/report/            a sweep: the chosen plans, with other noise and more samples, of all trainings
    OUT/result.json        the table

Trainings are runs of their own, which tables share. All that is finished stays, and an interrupted experiment goes on.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fpdm.drawing import Choices, load_pipeline
from fpdm.experiments.points import Axes, Point, Settings, distinct
from fpdm.experiments.sweep import all_points, run_points
from fpdm.experiments.table import Ground, Table, Training
from fpdm.experiments.trainings import is_trained, train_missing, written
from fpdm.experiments.tune import tune_model
from fpdm.files import model_folder, read_json, write_json
from fpdm.machine import made_with
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.training.build import build_model, open_source
from fpdm.training.config import Config
from fpdm.training.course import make_courses, mean_operations
from fpdm.weights import digest

CHOOSING, REPORTING = 1, 2  # seeds of the noise
Row = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A table, on a ground, in two folders.

    data       of the ground, where it is
    processes  trainings, and points, at a time
    """

    name: str
    table: Table
    ground: Ground
    data: str | None
    out: Path
    runs: Path
    processes: int = 1
    device: str = "auto"
    say: Callable[[str], None] = print

    def run(self, labels: Iterable[str] | None = None, seeds: Iterable[int] | None = None) -> Row:
        """Compute what is missing, of all models and trainings or of some of them; the table as far as it is there.

        Raises ValueError, before anything is computed, if `out` or `runs` hold something else, and for data that is
        not there.
        """
        wanted = set(labels or self.table.models)
        trainings = [training for training in self.trainings() if training.label in wanted]
        seeds = {self.ground.seeds[0], *(seeds or self.ground.seeds)}
        try:
            train_missing([t for t in trainings if t.seed in seeds], self.runs, self.processes, self.say)
            self.choose([t for t in trainings if t.seed == self.ground.seeds[0]])
            self.report([t for t in trainings if t.seed in seeds])
        finally:
            if self.out.is_dir():
                write_json(self.out / "result.json", self.result())
        return self.result()

    # --- trainings -------------------------------------------------------------------------------------------------

    def trainings(self) -> list[Training]:
        """Of all models, seed by seed: a table that is stopped half-way has whole rows of some seeds."""
        steps = self.steps()
        return [
            Training(label, seed, self.ground.recipe, {**self.changes(label), "steps": steps[label], "seed": seed})
            for seed in self.ground.seeds
            for label in self.table.models
        ]

    def changes(self, label: str) -> Row:
        """The fields of a model that differ from the recipe."""
        where = {} if self.data is None else {"data": self.data}
        return {**self.ground.changes, **where, "device": self.device, **self.table.models[label].changes}

    def steps(self) -> dict[str, int]:
        """Of each model: the recipe's, or as many as take the operations of the first model."""
        basis = Training("", 0, self.ground.recipe, self.ground.changes).config.optimizer.steps
        if self.table.equal == "steps":
            return dict.fromkeys(self.table.models, basis)
        costs = {label: self.operations(label) for label in self.table.models}
        first = next(iter(costs.values()))
        return {label: round(basis * first / cost) for label, cost in costs.items()}

    def operations(self, label: str) -> float:
        """Operations per image of a training step of a model, on average over its draws."""
        return operations_of_training(Training(label, 0, self.ground.recipe, self.changes(label)).config)

    def folder(self, training: Training) -> str:
        return model_folder(str(self.runs / training.name))

    # --- plans -----------------------------------------------------------------------------------------------------

    def choose(self, trainings: list[Training]) -> None:
        """Of each way and budget the plan with which a model, by its first training, draws best."""
        open_ones: dict[str, Point] = {}
        found = {}
        for training in trainings:
            found[training.label] = candidates = self.candidates(training)
            for budget in self.table.budgets:
                open_ones |= {point.key: point for point in to_choose_from(candidates, budget)}
        values = self.measured("choose", list(open_ones.values()), self.ground.chosen_on)
        (self.out / "chosen").mkdir(exist_ok=True, parents=True)
        for label, candidates in found.items():
            write_json(self.out / "chosen" / f"{label}.json", chosen(candidates, values))

    def candidates(self, training: Training) -> dict[tuple[str, int], list[Point]]:
        """The plans of each way and budget that a model can have."""
        folder = self.folder(training)
        if any(axes.tuned for axes in self.table.ways.values()):
            self.tune(training.label, folder)
        pipe = load_pipeline(folder, "cpu", "float32")
        identity = digest(pipe.transformer)
        found: dict[tuple[str, int], list[Point]] = {}
        for way, axes in self.table.ways.items():
            for point in distinct(training.label, folder, identity, pipe, untuned(axes, pipe), []):
                found.setdefault((way, point.budget), []).append(point)
        return found

    def tune(self, label: str, folder: str) -> None:
        """Have the ways' tuned plans with the model, those that it lacks."""
        there = {plan.budget for plan in load_pipeline(folder, "cpu", "float32").tuned_plans}
        axes = next(axes for axes in self.table.ways.values() if axes.tuned)
        missing = [budget for budget in axes.budgets if budget not in there]
        if missing:
            settings, out = self.settings(self.ground.chosen_on), self.out / "tune" / label
            tune_model(f"{label}={folder}", missing, list(axes.schedulers), settings, out, CHOOSING,
                       self.processes, self.say)  # fmt: skip

    def report(self, trainings: list[Training]) -> None:
        """Measure the chosen plans of the models."""
        points: dict[str, Point] = {}
        for training in trainings:
            folder = self.folder(training)
            pipe = load_pipeline(folder, "cpu", "float32")
            identity = digest(pipe.transformer)
            for row in self.reported_by(training):
                point = Point.of(training.name, folder, identity, pipe, row["budget"], reported(row["choices"]))
                points[point.key] = point
        self.measured("report", list(points.values()), self.ground.reported_on)

    def reported_by(self, training: Training) -> list[Row]:
        """The chosen plans that are measured of a training: of a model's first those of all ways, of the others at each
        budget that of the best way; of the only model of a table all."""
        rows = self.chosen(training.label)
        if training.seed == self.ground.seeds[0] or len(self.table.models) == 1:
            return rows
        return [row for row in rows if row["best"]]

    def measured(self, part: str, points: list[Point], images: int) -> dict[str, float]:
        """Point -> the Frechet distance of so many of its samples."""
        if points:
            run_points(points, self.settings(images), self.out / part, self.processes, self.say)
        wanted = {point.key for point in points}
        return {row["key"]: distance(row) for row in all_points(self.out / part) if row["key"] in wanted}

    def settings(self, images: int) -> Settings:
        data = self.data or self.ground.recipe
        return Settings(data, split=self.ground.split, num_images=images, device=self.device)

    def chosen(self, label: str) -> list[Row]:
        path = self.out / "chosen" / f"{label}.json"
        return read_json(path) if path.is_file() else []

    # --- the table -------------------------------------------------------------------------------------------------

    def result(self) -> Row:
        """All that is finished."""
        points = {row["key"]: row for row in all_points(self.out / "report")}
        trained = [training for training in self.trainings() if is_trained(training, self.runs)]
        found = []
        for training in trained:
            for row in self.reported_by(training):
                choices = reported(row["choices"])
                key = Point(training.name, "", "", row["budget"], choices).key
                if key in points:
                    found.append(cell_of(training, row, points[key]))
        some = next(iter(points.values()), None)
        return {
            "table": self.name,
            "question": self.table.question,
            "equal": self.table.equal,
            "ground": {**asdict(self.ground), "data": None},
            "models": {label: model.title for label, model in self.table.models.items()},
            "ways": list(self.table.ways),
            "budgets": self.table.budgets,
            "trainings": [{**written(t, self.runs), **self.cost(t)} for t in trained],
            "points": found,
            "real": some and {name: m["floor"] for name, m in measures(some).items()},
            "made_with": made_with("cpu") if some is None else some["made_with"],
        }

    def cost(self, training: Training) -> Row:
        """Parameters and operations of a training."""
        model = build_model(training.config, open_source(training.config.data))
        count = training.config.optimizer.steps * training.config.optimizer.batch_size
        return {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "operations": count * operations_of_training(training.config),
        }


def untuned(axes: Axes, pipe: FixedPointDiTPipeline) -> list[tuple[int, Choices, bool]]:
    """The choices of a way. Tuned plans are written out: trainings that were not tuned are to use them as well."""
    if not axes.tuned:
        return list(axes.choices(pipe, 1.0))
    return [(budget, choices, False) for budget, choices, tuned in axes.choices(pipe, 1.0) if tuned]


def to_choose_from(candidates: dict[tuple[str, int], list[Point]], budget: int) -> list[Point]:
    """The points of all ways at a budget, if there are several."""
    points = [point for (_, b), some in candidates.items() if b == budget for point in some]
    return points if len(points) > 1 else []


def chosen(candidates: dict[tuple[str, int], list[Point]], values: dict[str, float]) -> list[Row]:
    """Of each way and budget the best point; it is the `best` of its budget if no other way has a better one."""
    rows, least = list[Row](), dict[int, float]()
    for (way, budget), points in candidates.items():
        choice = min(points, key=lambda point: values.get(point.key, 0.0))
        value = values.get(choice.key, 0.0)
        others = [{"choices": p.choices.to_dict(), "value": values[p.key]} for p in points if p.key in values]
        least[budget] = min(value, least.get(budget, value))
        rows.append(
            {"way": way, "budget": budget, "choices": choice.choices.to_dict(), "value": value, "among": others}
        )
    return [{**row, "best": row["value"] == least[row["budget"]]} for row in rows]


def reported(choices: Row) -> Choices:
    """The choices of a plan, with the noise that is reported."""
    values: Row = {name: tuple(value) if isinstance(value, list) else value for name, value in choices.items()}
    return replace(Choices(**values), seed=REPORTING)


def cell_of(training: Training, row: Row, point: Row) -> Row:
    """What is kept of a point: `measures` are value, and ends of the 95% interval, by name."""
    kept = ("plan", "passes", "scheduler", "iterations", "allocation", "reuse", "solver", "operations", "seconds")
    return {
        "model": training.label,
        "seed": training.seed,
        "way": row["way"],
        "budget": row["budget"],
        **{name: point[name] for name in kept},
        "diverged": point["diverged"],
        "samples": point["evaluation"]["samples"],
        "measures": {name: [m["value"], m["low"], m["high"]] for name, m in measures(point).items()},
        "best": row["best"],
        "among": row["among"],
    }


def measures(point: Row) -> dict[str, Row]:
    return {m["name"]: m for m in point["evaluation"]["measures"]}


def distance(point: Row) -> float:
    return float(point["evaluation"]["measures"][0]["value"])


def operations_of_training(config: Config) -> float:
    """Operations per image of a training step, on average over its draws."""
    model = build_model(config, open_source(config.data))
    courses = None if config.model.network == "dit" else make_courses(config.gradient, config.model.num_core)
    return mean_operations(model, courses)
