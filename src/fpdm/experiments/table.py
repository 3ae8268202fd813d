"""What a table of results is made of: models that differ in a few settings, ways to draw from them, and the ground that
all of them stand on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fpdm.experiments.points import Axes
from fpdm.names import unknown
from fpdm.recipes import recipe
from fpdm.training.config import Config

EQUAL = ("steps", "operations")


@dataclass(frozen=True)
class Model:
    """A model of a table: what it is called in print, and the fields in which it differs from the recipe."""

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ground:
    """What all models of a table are trained and measured on.

    recipe       of the training
    changes      fields that differ from the recipe for all models
    data         what to bring; None where it is inside the package
    split        that the samples are compared with
    seeds        of the trainings; every model has one of each
    chosen_on    samples by which a plan is chosen, of the first seed's training
    reported_on  samples, of other noise, of the numbers that are reported
    """

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    split: str = "train"
    seeds: tuple[int, ...] = (0, 1, 2)
    chosen_on: int = 1000
    reported_on: int = 5000


@dataclass(frozen=True)
class Table:
    """A question, and what answers it.

    models  by label; the first one is what `equal` refers to
    ways    to draw, by name; of those of its plans that a budget allows, each model gets the one that suits it best
    equal   what trainings have in common besides batch and order of the data: steps, or operations, those of the first
            model
    """

    question: str
    models: Mapping[str, Model]
    ways: Mapping[str, Axes]
    equal: str = "steps"

    def __post_init__(self) -> None:
        if self.equal not in EQUAL:
            raise ValueError(unknown("equal", self.equal, EQUAL))

    @property
    def budgets(self) -> list[int]:
        """Of all ways, in order."""
        return sorted({budget for axes in self.ways.values() for budget in axes.budgets})


@dataclass(frozen=True)
class Part:
    """What of a table is to be computed; None stands for all."""

    models: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    ways: Sequence[str] | None = None
    budgets: Sequence[int] | None = None

    def has(
        self, model: str | None = None, seed: int | None = None, way: str | None = None, budget: int | None = None
    ) -> bool:
        """Whether what is named is in the part."""
        asked = ((model, self.models), (seed, self.seeds), (way, self.ways), (budget, self.budgets))
        return all(value is None or some is None or value in some for value, some in asked)

    def check(self, table: Table, ground: Ground) -> None:
        """Raises ValueError for what the table does not have."""
        for name, some, there in (
            ("model", self.models, list(table.models)), ("way", self.ways, list(table.ways)),
            ("seed", self.seeds, list(ground.seeds)), ("budget", self.budgets, table.budgets),
        ):  # fmt: skip
            for value in some or ():
                if value not in there:
                    raise ValueError(unknown(name, str(value), map(str, there)))


WHOLE = Part()


@dataclass(frozen=True)
class Training:
    """One training of a model.

    recipe   that it starts from
    changes  all fields that differ from it, the seed among them
    """

    label: str
    seed: int
    recipe: str
    changes: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its run. The steps are in it: two tables may train one model for different lengths."""
        return f"{self.label}-{self.config.optimizer.steps}-seed{self.seed}"

    @property
    def config(self) -> Config:
        return recipe(self.recipe).with_fields(**self.changes)

    @property
    def words(self) -> list[str]:
        """What follows `fpdm train` to do this training, but for names and places."""
        flags = []
        for name, value in self.changes.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                flags += [f"--{flag}", "none" if value is None else str(value)]
        return [self.recipe, *flags]
