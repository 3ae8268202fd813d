"""How models of an experiment compare: ratios of distances, training by training, as tables of Markdown."""

from itertools import product
from math import inf, log
from statistics import fmean, geometric_mean

from fpdm.evaluation.result import significant
from fpdm.experiments.rows import Row, distance, reached, shown

BySeed = dict[int, float]


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


class Distances:
    """The Frechet distances of an experiment's result, by model and budget: seed -> distance.

    way  of drawing; None takes that which the table of the models shows
    """

    def __init__(self, result: Row, way: str | None = None):
        self.titles: dict[str, str] = result["models"]
        self.points: dict[tuple[str, int], list[Row]] = {}
        for label in self.titles:
            own = [p for p in result["points"] if p["model"] == label and way in (None, p["way"])]
            self.points |= {(label, budget): some for budget, some in shown(own).items()}
        self.budgets = [b for b in reached(result, "budgets") if any(b == budget for _, budget in self.points)]
        self.trainings: dict[str, Row] = {training["model"]: training for training in result["trainings"]}
        self.explicit = [label for label in self.titles if "--network dit" in self._command(label)]
        self.implicit = [label for label in self.titles if label in self.trainings and label not in self.explicit]

    def _command(self, label: str) -> str:
        return str(self.trainings.get(label, {}).get("command", ""))

    def of(self, label: str, budget: int) -> BySeed:
        """Seed -> distance; none where it was not measured."""
        return {point["seed"]: distance(point) for point in self.points.get((label, budget), [])}

    def operations(self, label: str, budget: int) -> float:
        """That a sample takes."""
        return float(self.points[label, budget][0]["operations"])

    def head(self, first: str) -> list[str]:
        return [row([first, *map(str, self.budgets)]), row(["---"] * (1 + len(self.budgets)))]

    def ratio(self, label: str, other: str, budget: int) -> str:
        return ratio(self.of(label, budget), self.of(other, budget))

    def lowest(self, labels: list[str], budget: int) -> str:
        """The model whose mean is the lowest."""
        return min((fmean(self.of(label, budget).values()), label) for label in labels
                   if (label, budget) in self.points)[1]  # fmt: skip

    def best(self, budget: int) -> tuple[str, str]:
        """The fixed point network and the explicit one whose means are the lowest."""
        return self.lowest(self.implicit, budget), self.lowest(self.explicit, budget)

    def interpolated(self, label: str, operations: float) -> BySeed:
        """Seed -> the distance of samples of so many operations, on a line through the logarithms between the budgets
        that cost less and more; none where one of these is missing."""
        costs = {b: self.operations(label, b) for b in self.budgets if (label, b) in self.points}
        less = max((b for b in costs if costs[b] <= operations), default=None)
        more = min((b for b in costs if costs[b] >= operations), default=None)
        if less is None or more is None:
            return {}
        share = log(operations / costs[less]) / log(costs[more] / costs[less]) if more != less else 0.0
        low, high = self.of(label, less), self.of(label, more)
        return {seed: low[seed] ** (1 - share) * high[seed] ** share for seed in low.keys() & high.keys()}

    def ratio_of_operations(self, label: str, budget: int) -> str:
        """Of a model to the best explicit network whose samples take as many operations."""
        operations = self.operations(label, budget)
        others = [self.interpolated(other, operations) for other in self.explicit]
        least = min(others, key=lambda found: fmean(found.values()) if found else inf)
        return ratio(self.of(label, budget), least)


def quotients(own: BySeed, its: BySeed) -> list[float]:
    """Of distances by seed to others, training by training."""
    return [own[seed] / its[seed] for seed in own.keys() & its.keys()]


def ratio(own: BySeed, its: BySeed) -> str:
    """Of distances by seed to others, training by training: the geometric mean and the range. Below 1 the first are
    ahead; bold where they are in every one of several trainings."""
    values = quotients(own, its)
    if not values:
        return ""
    middle = f"{geometric_mean(values):.2f}"
    if len(values) == 1:
        return middle
    return f"{f'**{middle}**' if max(values) < 1 else middle} ({min(values):.2f} to {max(values):.2f})"


def ratios(result: Row, labels: list[str], others: list[str], way: str | None = None) -> str:
    """The Frechet distances of models relative to those of others, named by label."""
    table = Distances(result, way)
    pairs = list(product(labels, others))
    table.budgets = [b for b in table.budgets if any(table.ratio(*pair, b) for pair in pairs)]
    lines = table.head("ratio of distances")
    for label, other in pairs:
        name = f"{table.titles[label]} / {table.titles[other]}"
        lines.append(row([name, *(table.ratio(label, other, budget) for budget in table.budgets)]))
    return "\n".join(lines)


def best(result: Row, way: str | None = None) -> str:
    """The best explicit network at each budget, the best fixed point network, and what the one has of the other's; also
    of what the best explicit network has that spends as many operations, since block passes do not count injections."""
    table = Distances(result, way)
    own, other = zip(*map(table.best, table.budgets), strict=True)
    lines = table.head("block passes")
    for name, labels in (("best DiT", other), ("best FPDM", own)):
        cells = [f"{table.titles[label]}: {significant(fmean(table.of(label, budget).values()))}"
                 for label, budget in zip(labels, table.budgets, strict=True)]  # fmt: skip
        lines.append(row([name, *cells]))
    at_passes = [table.ratio(*place) for place in zip(own, other, table.budgets, strict=True)]
    at_operations = [table.ratio_of_operations(*place) for place in zip(own, table.budgets, strict=True)]
    lines += [row(["FPDM relative to DiT", *at_passes]), row(["at as many operations", *at_operations])]
    return "\n".join(lines)


def choices(steps: Row, operations: Row, other: Row, places: list[tuple[int, str]], way: str) -> str:
    """Fixed point networks that may be chosen at a budget, each beside the explicit network that is the best there.

    steps, operations  results on one set of data, of trainings with equally many steps and operations
    other              the result on other data, at equal steps
    places             a budget and a model, a row for each
    """
    equal_steps, equal_operations, elsewhere = Distances(steps, way), Distances(operations), Distances(other, way)
    here, there = (result["ground"]["recipe"].replace("_", "-") for result in (steps, other))
    heads = ["passes", "network", "timesteps x iterations", f"{here}, equal steps", "also equal operations of samples",
             f"{here}, equal training operations", f"{there}, equal steps"]  # fmt: skip
    heads += ["beside, at equal steps", "parameters", "training operations"]
    lines = [row(heads), row(["---"] * len(heads))]
    for budget, label in places:
        least = equal_steps.lowest(equal_steps.explicit, budget)
        own, its = equal_steps.trainings[label], equal_steps.trainings[least]
        cells = [str(budget), equal_steps.titles[label], plan_of(equal_steps.points[label, budget][0])]
        cells += [beside_best(equal_steps, label, budget), equal_steps.ratio_of_operations(label, budget)]
        cells += [beside_best(table, label, budget) for table in (equal_operations, elsewhere)]
        cells += [equal_steps.titles[least]]
        lines.append(row([*cells, *(f"{own[name] / its[name]:.2f}" for name in ("parameters", "operations"))]))
    return "\n".join(lines)


def beside_best(table: Distances, label: str, budget: int) -> str:
    """The ratio to the best explicit network at a budget; nothing where the model was not measured there."""
    if (label, budget) not in table.points:
        return ""
    return table.ratio(label, table.lowest(table.explicit, budget), budget)


def plan_of(point: Row) -> str:
    """Timesteps and iterations."""
    steps, _, iterations = point["plan"].partition(", ")[0].partition(" x ")
    return f"{steps.split()[0]} x {iterations.split()[0]}"
