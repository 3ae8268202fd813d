"""A table of results: train what is missing of its models, choose each one's plans, measure them, and sum up.

    OUT/choose/            a sweep: the plans among which each model's are chosen
    OUT/chosen/MODEL.json  the plan of each way and budget, and what the others had
    OUT/report/            a sweep: the chosen plans, with other noise and more samples, of all trainings
    OUT/result.json        the table

Trainings are runs of their own, which tables share. All that is finished stays, and an interrupted experiment goes on.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fpdm.drawing import Choices, load_pipeline
from fpdm.experiments import kept as kepts
from fpdm.experiments.points import Axes, Point, Settings, distinct
from fpdm.experiments.residuals import residuals_by_timestep
from fpdm.experiments.sweep import all_points, check_claim, run_points
from fpdm.experiments.table import WHOLE, Ground, Part, Table, Training
from fpdm.experiments.trainings import check_runs, is_trained, train_missing, written
from fpdm.experiments.tune import tune_model
from fpdm.files import model_folder, read_json, write_json
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.training.build import build_model, open_source
from fpdm.training.config import Config
from fpdm.training.course import make_courses, mean_operations
from fpdm.weights import digest

AT_ONCE = 250  # samples drawn; with 64, the small networks of these tables take a tenth more time per sample
TUNING, REPORTING = 1, 3  # seeds of the noise; plans are chosen with 0, and tuning takes the seed after its own, too
RESULT = "result.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A table, on a ground, in two folders.

    data       of the ground, where it is
    processes  trainings, and points, at a time
    kept       a result of this table from elsewhere, which may lack models, seeds, ways and budgets. What it has is
               not computed here, and what is computed here joins it: of a training of which it has all points that are
               asked for nothing, of others the training and the points that it lacks
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
    kept: Row | None = None

    def run(self, part: Part = WHOLE) -> Row:
        """Compute what is missing of the table, or of a part of it; the table as far as it is there.

        Raises ValueError, before anything is computed, for a part that is none of this table's, if `out` or `runs` hold
        something else, and for data that is not there.
        """
        self.check(part)
        trainings = self.trainings(part)
        try:
            train_missing(trainings, self.runs, self.processes, self.say)
            self.choose([training for training in trainings if training.seed == self.ground.seeds[0]], part)
            self.report(trainings, part)
        finally:
            result = self.result()
            if self.out.is_dir():
                write_json(self.out / RESULT, result)
        return result

    def check(self, part: Part = WHOLE) -> None:
        """Raises ValueError for what `run` would be refused for."""
        part.check(self.table, self.ground)
        if self.kept is not None:
            kepts.check_kept(self.kept, self.name, self.table, self.ground, self.steps())
        if trainings := self.trainings(part):
            source = opened(trainings[0].config.data)
            check_runs(trainings, self.runs, source.fingerprint)
        for name, images in (("choose", self.ground.chosen_on), ("report", self.ground.reported_on)):
            check_claim(self.out / name, self.settings(images), [])

    # --- trainings -------------------------------------------------------------------------------------------------

    def trainings(self, part: Part = WHOLE) -> list[Training]:
        """Of all models, or those of a part and with them the ones that plans are chosen by, without those that are
        kept; seed by seed, so that a table that is stopped half-way has all rows of some seeds."""
        steps = self.steps()
        asked = [
            Training(label, seed, self.ground.recipe, {**self.changes(label), "steps": steps[label], "seed": seed})
            for seed in self.ground.seeds
            for label in self.table.models
            if part.has(model=label) and (seed == self.ground.seeds[0] or part.has(seed=seed))
        ]
        return [training for training in asked if not self.is_kept(training, part)]

    def kept_of(self, label: str, seed: int) -> set[tuple[str, int]]:
        """The ways and budgets that are kept of a training."""
        return kepts.measured(self.kept).get((label, seed), set())

    def is_kept(self, training: Training, part: Part) -> bool:
        """Whether all is kept that a part asks of a training."""
        there = self.kept_of(training.label, training.seed)
        asked = {
            (way, budget)
            for way, axes in self.table.ways.items()
            for budget in axes.budgets
            if part.has(way=way, budget=budget)
        }
        return asked <= there

    def changes(self, label: str) -> Row:
        """The fields of a model that differ from the recipe."""
        where = {} if self.data is None else {"data": self.data}
        return {**self.ground.changes, **where, "device": self.device, **self.table.models[label].changes}

    def steps(self) -> dict[str, int]:
        """Of each model: the recipe's, or as many as take the operations of the first model."""
        basis = Training("", 0, self.ground.recipe, self.ground.changes).config.optimizer.steps
        if self.table.equal == "steps":
            return {label: model.changes.get("steps", basis) for label, model in self.table.models.items()}
        costs = {label: self.operations(label) for label in self.table.models}
        first = next(iter(costs.values()))
        return {label: round(basis * first / cost) for label, cost in costs.items()}

    def operations(self, label: str) -> float:
        """Operations per image of a training step of a model, on average over its draws."""
        return operations_of_training(Training(label, 0, self.ground.recipe, self.changes(label)).config)

    def folder(self, training: Training) -> str:
        return model_folder(str(self.runs / training.name))

    # --- plans -----------------------------------------------------------------------------------------------------

    def choose(self, trainings: list[Training], part: Part) -> None:
        """Of each way and budget the plan with which a model, by its first training, draws best."""
        for training in trainings:
            self.tune(training, part)
        found = {training.label: self.candidates(training) for training in trainings}
        wanted = {
            point.key: point
            for label, candidates in found.items()
            for (way, budget), points in candidates.items()
            if part.has(way=way, budget=budget) and is_open(candidates, budget)
            if (way, budget) not in self.kept_of(label, self.ground.seeds[0])
            for point in points
        }
        values = self.measured("choose", list(wanted.values()), self.ground.chosen_on)
        (self.out / "chosen").mkdir(exist_ok=True, parents=True)
        for label, candidates in found.items():
            kept = kepts.chosen(self.kept, label, self.ground.seeds[0])
            write_json(self.out / "chosen" / f"{label}.json", self.merged(chosen(candidates, values), kept))

    def merged(self, made: list[Row], kept: list[Row]) -> list[Row]:
        """Kept rows, and those of other ways and budgets that were chosen here; the best of each budget is marked."""
        rows = {self.place(row): row for row in [*made, *kept]}
        least: dict[int, float] = {}
        for row in rows.values():
            if row["among"]:
                least[row["budget"]] = min(row["value"], least.get(row["budget"], row["value"]))
        return [{**row, "best": row["value"] == least.get(row["budget"])} for _, row in sorted(rows.items())]

    def place(self, row: Row) -> tuple[int, int]:
        """Of a way and a budget in the table."""
        return list(self.table.ways).index(row["way"]), row["budget"]

    def candidates(self, training: Training) -> dict[tuple[str, int], list[Point]]:
        """The plans of each way and budget that a model can have."""
        folder = self.folder(training)
        pipe = load_pipeline(folder, "cpu", "float32")
        identity = digest(pipe.transformer)
        found: dict[tuple[str, int], list[Point]] = {}
        for way, axes in self.table.ways.items():
            for point in distinct(training.label, folder, identity, pipe, untuned(axes, pipe), []):
                found.setdefault((way, point.budget), []).append(point)
        return found

    def tune(self, training: Training, part: Part) -> None:
        """Have the tuned plans that ways ask for with the model, those that it lacks."""
        label, folder = training.label, self.folder(training)
        for way, axes in self.table.ways.items():
            if axes.tuned:
                plans = load_pipeline(folder, "cpu", "float32").tuned_plans
                there = {plan.budget for plan in plans if plan.guidance_scale == 1}
                kept = self.kept_of(label, training.seed)
                missing = [
                    b for b in axes.budgets
                    if b not in there and part.has(way=way, budget=b) and (way, b) not in kept
                ]  # fmt: skip
                settings, out = self.settings(self.ground.chosen_on), self.out / "tune" / label
                if missing:
                    tune_model(f"{label}={folder}", missing, list(axes.schedulers), settings, out, TUNING,
                               self.processes, self.say)  # fmt: skip

    def report(self, trainings: list[Training], part: Part) -> None:
        """Measure the chosen plans of the models."""
        points: dict[str, Point] = {}
        for training in trainings:
            folder = self.folder(training)
            pipe = load_pipeline(folder, "cpu", "float32")
            identity = digest(pipe.transformer)
            kept = self.kept_of(training.label, training.seed)
            for row in self.chosen(training.label):
                if part.has(way=row["way"], budget=row["budget"]) and (row["way"], row["budget"]) not in kept:
                    point = Point.of(training.name, folder, identity, pipe, row["budget"], reported(row["choices"]))
                    points[point.key] = point
        self.measured("report", list(points.values()), self.ground.reported_on)

    def measured(self, part: str, points: list[Point], images: int) -> dict[str, float]:
        """Point -> the Frechet distance of so many of its samples, of these and all that are there."""
        if points:
            run_points(points, self.settings(images), self.out / part, self.processes, self.say)
        return {row["key"]: distance(row) for row in all_points(self.out / part)}

    def settings(self, images: int) -> Settings:
        data = self.data or self.ground.recipe
        return Settings(data, self.ground.split, num_images=images, batch_size=AT_ONCE, device=self.device)

    def chosen(self, label: str) -> list[Row]:
        path = self.out / "chosen" / f"{label}.json"
        return read_json(path) if path.is_file() else kepts.chosen(self.kept, label, self.ground.seeds[0])

    # --- the table -------------------------------------------------------------------------------------------------

    def result(self) -> Row:
        """All that is finished."""
        points = {row["key"]: row for row in all_points(self.out / "report")}
        trained = [training for training in self.trainings() if is_trained(training, self.runs)]
        found = []
        for training in trained:
            for row in self.chosen(training.label):
                choices = reported(row["choices"])
                key = Point(training.name, "", "", row["budget"], choices).key
                if key in points:
                    found.append(cell_of(training, row, points[key]))
        some = next(iter(points.values()), None)
        made = {
            "table": self.name,
            "question": self.table.question,
            "equal": self.table.equal,
            "ground": {**asdict(self.ground), "data": None},
            "models": {label: model.title for label, model in self.table.models.items()},
            "ways": list(self.table.ways),
            "budgets": self.table.budgets,
            "trainings": [{**written(t, self.runs), **self.cost(t), **self.convergence(t)} for t in trained],
            "points": found,
            "real": some and {name: m["floor"] for name, m in measures(some).items()},
        }
        return kepts.compact(made if self.kept is None else self.joined(made, kepts.expanded(self.kept)))

    def joined(self, made: Row, kept: Row) -> Row:
        """What is kept, and what was made here besides, as a result that was computed in one place has it."""
        best = {(label, self.place(row)): row["best"] for label in self.table.models for row in self.chosen(label)}
        points = {(row["model"], row["seed"], self.place(row)): row for row in [*made["points"], *kept["points"]]}
        points = {key: {**row, "best": best.get((key[0], key[2]), row["best"])} for key, row in points.items()}
        there = {key[:2] for key in points}
        trainings = {(row["model"], row["seed"]): row for row in [*made["trainings"], *kept["trainings"]]}
        labels, seeds = list(self.table.models), self.ground.seeds

        def order(found: dict[Any, Row]) -> list[Row]:
            return [found[key] for key in sorted(found, key=lambda k: (seeds.index(k[1]), labels.index(k[0]), k[2:]))]

        return {
            **made,
            "trainings": order({key: row for key, row in trainings.items() if key in there}),
            "points": order(points),
            "real": made["real"] or kept["real"],
        }

    def cost(self, training: Training) -> Row:
        """Parameters and operations of a training."""
        model = build_model(training.config, opened(training.config.data))
        count = training.config.optimizer.steps * training.config.optimizer.batch_size
        return {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "operations": count * operations_of_training(training.config),
        }

    def convergence(self, training: Training) -> Row:
        """How fast a trained fixed point network's iterates converge. Kept with the run: it takes a while."""
        if training.config.model.network == "dit":
            return {}
        path = self.runs / training.name / "residuals.json"
        if not path.is_file():
            pipe = load_pipeline(self.folder(training), "cpu", "float32")
            write_json(path, residuals_by_timestep(pipe, opened(training.config.data)))
        return {"convergence": read_json(path)}


def untuned(axes: Axes, pipe: FixedPointDiTPipeline) -> list[tuple[int, Choices, bool]]:
    """The choices of a way. Tuned plans are written out: trainings that were not tuned are to use them as well."""
    if not axes.tuned:
        return list(axes.choices(pipe, 1.0))
    return [(budget, choices, False) for budget, choices, tuned in axes.choices(pipe, 1.0) if tuned]


def is_open(candidates: dict[tuple[str, int], list[Point]], budget: int) -> bool:
    """Whether there are several plans of a budget, of one way or of several."""
    return sum(len(points) for (_, b), points in candidates.items() if b == budget) > 1


def chosen(candidates: dict[tuple[str, int], list[Point]], values: dict[str, float]) -> list[Row]:
    """Of each way and budget the best point, once all have a value. Where there is but one plan, it needs none."""
    rows = list[Row]()
    for (way, budget), points in candidates.items():
        among = points if is_open(candidates, budget) else []
        if all(point.key in values for point in among):
            choice = min(among, key=lambda point: values[point.key], default=points[0])
            rows.append({
                "way": way,
                "budget": budget,
                "choices": choice.choices.to_dict(),
                "value": values[choice.key] if among else None,
                "among": [{"choices": p.choices.to_dict(), "value": values[p.key]} for p in among],
            })  # fmt: skip
    return rows


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
        "made_with": point["made_with"],
        "best": row["best"],
        "among": [{**unusual(other["choices"]), "value": other["value"]} for other in row["among"]],
    }


def unusual(choices: Row) -> Row:
    """What is not the default of some choices, but for budget and seed."""
    usual = Choices().to_dict() | {"budget": choices["budget"], "seed": choices["seed"]}
    return {name: value for name, value in choices.items() if value != usual[name]}


def measures(point: Row) -> dict[str, Row]:
    return {m["name"]: m for m in point["evaluation"]["measures"]}


def distance(point: Row) -> float:
    return float(point["evaluation"]["measures"][0]["value"])


opened = lru_cache(maxsize=1)(open_source)  # to open a large folder takes seconds, and a table asks for it many times


@lru_cache(maxsize=64)
def operations_of_training(config: Config) -> float:
    """Operations per image of a training step, on average over its draws."""
    model = build_model(config, opened(config.data))
    courses = None if config.model.network == "dit" else make_courses(config.gradient, config.model.num_core)
    return mean_operations(model, courses)
