"""Draw the plots of the docs that come from kept results.

python scripts/write_plots.py          writes docs/images/solver_images.png, shares.png, ahead.png, and one of
                                       each table of reproduction.md
"""

import json
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fpdm.experiments.comparison import Distances, quotients
from fpdm.experiments.plots import plot

ROOT = Path(__file__).parents[1]
REPRODUCTION = "benchmarks/results/2026-11-23-reproduction"
PERFORMANCE = "benchmarks/results/2026-11-29-performance/performance.json"
LADDERS = {"digits": "2026-11-23-ladder-digits", "Fashion-MNIST": "2026-11-23-ladder-fashion"}
MAIN = {"digits": "digits", "fashion-mnist": "Fashion-MNIST"}
SOLVERS, COUNTS, BUDGETS = {"picard": "o", "anderson:2": "s", "broyden": "^"}, (2, 4, 8), {40: "C0", 80: "C1"}


def distances(folder: str) -> dict[tuple[int, str, int], list[float]]:
    """The Frechet distances over seeds, by budget, solver and iterations: plain reuse under DPM-Solver++."""
    found: dict[tuple[int, str, int], list[float]] = {}
    for path in sorted((ROOT / "benchmarks/results" / folder / "points").glob("*.json")):
        point: dict[str, Any] = json.loads(path.read_text())
        if (point["scheduler"], point["reuse"], point["tuned"]) == ("dpm++", "plain", False):
            key = (point["budget"], point["solver"], point["iterations"])
            found.setdefault(key, []).append(point["evaluation"]["measures"][0]["value"])
    return found


def spread(means: list[float], values: list[list[float]]) -> list[list[float]]:
    """How far the lowest and the highest of some values are from their mean, as matplotlib takes it."""
    return [[m - min(some) for m, some in zip(means, values, strict=True)],
            [max(some) - m for m, some in zip(means, values, strict=True)]]  # fmt: skip


def solver_images(path: Path) -> None:
    """Image quality by iterations per timestep, a line per solver and budget, a panel per model."""
    figure, axes = plt.subplots(1, len(LADDERS), figsize=(11, 4.2), layout="constrained")
    for axis, (name, folder) in zip(axes, LADDERS.items(), strict=True):
        found = distances(folder)
        for budget, colour in BUDGETS.items():
            for place, (solver, marker) in enumerate(SOLVERS.items()):
                values = [found[budget, solver, n] for n in COUNTS]
                means = [mean(some) for some in values]
                places = [n * (1 + 0.03 * (place - 1)) for n in COUNTS]
                look = {"marker": marker, "color": colour, "alpha": 1 - 0.25 * place, "linewidth": 1, "capsize": 2}
                axis.errorbar(places, means, spread(means, values), label=f"{solver}, {budget} passes", **look)
        axis.set(title=name, xlabel="iterations per timestep", ylabel="FD-classifier, lower is better", xscale="log")
        axis.set_xticks(COUNTS, [str(n) for n in COUNTS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def shares(path: Path) -> None:
    """The share of the matrix rate that an iteration reaches, a line per width."""
    rows = json.loads((ROOT / PERFORMANCE).read_text())["parts"]["shares"]["rows"]
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for width in sorted({row["width"] for row in rows}):
        own = [row for row in rows if row["width"] == width]
        axis.plot([r["batch"] for r in own], [r["share of the matrix rate"] for r in own], "o-", label=f"{width} wide")
    batches = sorted({row["batch"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(n) for n in batches])
    axis.set(xlabel="batch, of 256 tokens each", ylabel="share of the matrix rate", ylim=(0, 1.05))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def ahead(path: Path) -> None:
    """What the best fixed point network's distance is of the best DiT's, a line per scheduler, a panel per data set."""
    figure, axes = plt.subplots(1, len(MAIN), figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, (name, data) in zip(axes, MAIN.items(), strict=True):
        result = json.loads((ROOT / REPRODUCTION / f"main-{name}.json").read_text())
        for place, way in enumerate(result["ways"]):
            table = Distances(result, way)
            values = [ratios_at(table, budget) for budget in table.budgets]
            means = [geometric_mean(some) for some in values]
            places = [budget * (1 + 0.03 * (place - 1.5)) for budget in table.budgets]
            look = {"marker": "o^sD"[place], "markersize": 5, "linewidth": 1.2, "capsize": 2}
            axis.errorbar(places, means, spread(means, values), label=way, **look)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=data, xlabel="block passes per image", xscale="log")
        axis.set_xticks(result["budgets"], list(map(str, result["budgets"])))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("best FPDM / best DiT, below 1 FPDM is ahead")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def ratios_at(table: Distances, budget: int) -> list[float]:
    """Of each training."""
    own, other = table.best(budget)
    return quotients(table.of(own, budget), table.of(other, budget))


if __name__ == "__main__":
    ahead(ROOT / "docs/images/ahead.png")
    shares(ROOT / "docs/images/shares.png")
    solver_images(ROOT / "docs/images/solver_images.png")
    for path in sorted((ROOT / REPRODUCTION).glob("*.json")):
        result = json.loads(path.read_text())
        if path.stem in ("main-digits", "main-fashion-mnist"):  # of the scheduler of the table beside it
            result["points"] = [point for point in result["points"] if point["way"] == "UniPC"]
        plot(result, ROOT / "docs/images" / f"{path.stem}.png")
