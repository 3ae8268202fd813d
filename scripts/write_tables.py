"""Write the tables of the docs from kept results: what stands between `<!-- table NAME ... -->` and `<!-- end -->`.

python scripts/write_tables.py          writes README.md and the pages in docs/
python scripts/write_tables.py --check  fails if it would change anything
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fpdm.evaluation import Evaluation, Measure
from fpdm.evaluation.result import significant
from fpdm.experiments import comparison
from fpdm.experiments.comparison import row
from fpdm.experiments.show import markdown

ROOT = Path(__file__).parents[1]
PAGES = tuple(
    ROOT / name
    for name in ("README.md", "docs/evaluation.md", "docs/how-to-choose.md", "docs/performance.md",
                 "docs/reproduction.md", "docs/training.md")
)  # fmt: skip
Point = dict[str, Any]


def points_of(folder: str) -> list[Point]:
    paths = sorted((ROOT / folder / "points").glob("*.json"))
    points = [json.loads(path.read_text()) for path in paths]
    return [{**point, "evaluation": Evaluation.from_dict(point["evaluation"])} for point in points]


def cell(m: Measure) -> str:
    return f"{significant(m.value)} ({significant(m.low)} to {significant(m.high)})"


def metrics(folder: str, model: str, scheduler: str) -> str:
    """All metrics of one model with one scheduler, a row per budget."""
    points = [p for p in points_of(folder) if (p["model"], p["scheduler"]) == (model, scheduler)]
    points.sort(key=lambda point: point["budget"])
    measures = points[0]["evaluation"].measures
    lines = [row(["passes", "plan", *(m.name for m in measures)]), row(["---"] * (2 + len(measures)))]
    for p in points:
        plan = p["plan"].rsplit(", ", 1)[0]
        lines.append(row([str(p["passes"]), plan, *(cell(m) for m in p["evaluation"].measures)]))
    return "\n".join([*lines, row(["real images", "", *(m.real for m in measures)])])


def models(folder: str, scheduler: str) -> str:
    """The Frechet distance of all models with one scheduler, a row per model."""
    points = [p for p in points_of(folder) if p["scheduler"] == scheduler]
    budgets = sorted({p["budget"] for p in points})
    found = {(p["model"], p["budget"]): p for p in points}
    lines = [row(["model", "parameters", *map(str, budgets)]), row(["---"] * (2 + len(budgets)))]
    for model in sorted({p["model"] for p in points}):
        one = next(p for p in points if p["model"] == model)
        cells = [cell(found[model, b]["evaluation"].measures[0]) if (model, b) in found else "" for b in budgets]
        lines.append(row([model, f"{one['parameters'] / 1e6:.2f} M", *cells]))
    return "\n".join(lines)


# Ways to spend a budget, and the points of a sweep that are such. "No smoothing" is the mean of the training's counts.
PLAIN: dict[str, Any] = {"scheduler": "dpm++", "solver": "picard", "tuned": False}
LADDER: dict[str, dict[str, Any]] = {
    "no smoothing: 6 iterations": {**PLAIN, "iterations": 6, "reuse": "none"},
    "smoothing: 2 iterations": {**PLAIN, "iterations": 2, "reuse": "none"},
    "+ reuse": {**PLAIN, "iterations": 2, "reuse": "plain"},
    "+ linear forecast": {**PLAIN, "iterations": 2, "reuse": "linear"},
    "or quadratic forecast": {**PLAIN, "iterations": 2, "reuse": "quadratic"},
    "linear forecast, Anderson": {**PLAIN, "iterations": 2, "reuse": "linear", "solver": "anderson:2"},
    "reuse, UniPC: 2 to 4 iterations": {**PLAIN, "scheduler": "unipc", "reuse": "plain"},
    "tuned": {"tuned": True},
}


def over_seeds(points: list[Point]) -> str:
    """The mean of the points' Frechet distances, and the smallest and largest; nothing where there are none."""
    values = [p["evaluation"].measures[0].value for p in points]
    if not values:
        return ""
    return f"{significant(sum(values) / len(values))} ({significant(min(values))} to {significant(max(values))})"


def ladder(folder: str) -> str:
    """The Frechet distance by way to spend the budget: mean over seeds, and the smallest and largest."""
    points = points_of(folder)
    budgets = sorted({p["budget"] for p in points})
    lines = [row(["", *map(str, budgets)]), row(["---"] * (1 + len(budgets)))]
    for name, wanted in LADDER.items():
        cells = []
        for budget in budgets:
            some = [p for p in points if p["budget"] == budget and all(p.get(k) == v for k, v in wanted.items())]
            if len({p["seed"] for p in some}) < len(some):
                raise ValueError(f"{folder} has several points of {name!r} at {budget} with one seed")
            cells.append(over_seeds(some))
        lines.append(row([name, *cells]))
    real = points[0]["evaluation"].measures[0].real
    return "\n".join([*lines, row(["real images", *[real] * len(budgets)])])


def solver_images(folder: str, *counts: str) -> str:
    """The Frechet distance by iterations and solver, plain reuse under DPM-Solver++: means over seeds."""
    points = [p for p in points_of(folder) if (p["scheduler"], p["reuse"], p["tuned"]) == ("dpm++", "plain", False)]
    names = sorted({p["solver"] for p in points}, key=lambda name: (name != "picard", name))
    budgets = sorted({p["budget"] for p in points if p["solver"] != "picard"})
    lines = [row(["iterations", "solver", *map(str, budgets)]), row(["---"] * (2 + len(budgets)))]
    for n in counts:
        for name in names:
            cells = []
            for budget in budgets:
                some = [p for p in points if (p["budget"], p["iterations"], p["solver"]) == (budget, int(n), name)]
                cells.append(over_seeds(some))
            lines.append(row([n, name, *cells]))
    return "\n".join(lines)


def tuned(folder: str) -> str:
    """What was found for each budget, and how it compared to the best plan of equal iterations in the search."""
    plans = json.loads((ROOT / folder / "plans.json").read_text())
    heads = ["budget", "timesteps", "iterations", "scheduler", "reuse", "solver", "by hand", "tuned", "best by hand"]
    lines = [row(heads), row(["---"] * len(heads))]
    for plan in plans:
        found, counts = plan["found"], plan["iterations"]
        spread = str(counts[0]) if len(set(counts)) == 1 else f"{counts[0]}, {counts[1]}, ... {counts[-1]}"
        cells = [str(plan["budget"]), str(len(counts)), spread, plan["scheduler"], plan["reuse"], plan["solver"],
                 significant(found["by_hand"]), significant(found["value"]), found["plan_by_hand"]]  # fmt: skip
        lines.append(row(cells))
    return "\n".join(lines)


def solvers(path: str, *counts: str) -> str:
    """The error of x0 that solvers leave, relative to plain iteration, and their time."""
    result = json.loads((ROOT / path).read_text())
    errors = {(r["solver"], r["iterations"]): r["error"] for r in result["means"]}
    lines = [row(["solver", "time", *(f"n = {n}" for n in counts)]), row(["---"] * (2 + len(counts)))]
    for name, seconds in result["seconds"].items():
        ratios = [f"{errors[name, int(n)] / errors['picard', int(n)]:.2f}" for n in counts]
        lines.append(row([name, f"{seconds:.2f}", *ratios]))
    return "\n".join([*lines, row(["picard's error", "", *(f"{errors['picard', int(n)]:.1e}" for n in counts)])])


def stopping(path: str) -> str:
    result = json.loads((ROOT / path).read_text())["parts"]["stopping"]
    lines = [row(["finished early", "sum of iterations", "seconds"]), row(["---"] * 3)]
    for r in result["rows"]:
        low, high = r["quartiles"]
        seconds = f"{r['ratio of seconds']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(row([f"{r['finished early']} of {r['of']}", f"{r['ratio of sums']:.2f}", seconds]))
    return "\n".join(lines)


def gradients(path: str) -> str:
    """What methods of differentiation store and take, relative to the first, and how near they are to the truth."""
    rows = json.loads((ROOT / path).read_text())["rows"]
    lines = [row(["method", "stored", "seconds", "1 - cosine"]), row(["---"] * 4)]
    for r in rows:
        stored, seconds = (f"{r[key] / rows[0][key]:.2f}" for key in ("bytes", "seconds"))
        lines.append(row([r["method"], stored, seconds, f"{1 - r['cosine']:.2g}"]))
    return "\n".join(lines)


MEMORY: dict[str, dict[str, Any]] = {
    "DiT": {"network": "dit", "checkpointing": False},
    "DiT, checkpointing": {"network": "dit", "checkpointing": True},
    "FPDM, mean draw": {"draw": "mean", "checkpointing": False},
    "FPDM, most": {"draw": "most", "checkpointing": False},
    "FPDM, most, checkpointing": {"draw": "most", "checkpointing": True},
}


def memory(path: str, batch_size: str) -> str:
    """GB at the peak of a training step, a row per size and precision."""
    counted = [r for r in json.loads((ROOT / path).read_text())["counted"] if r["batch_size"] == int(batch_size)]
    lines = [row(["", *MEMORY]), row(["---"] * (1 + len(MEMORY)))]
    for size, precision in dict.fromkeys((r["model"], r["mixed_precision"]) for r in counted):
        same = [r for r in counted if (r["model"], r["mixed_precision"]) == (size, precision)]
        found = [[r for r in same if all(r.get(k) == v for k, v in wanted.items())] for wanted in MEMORY.values()]
        cells = [f"{some[0]['peak'] / 1e9:.1f}" if some else "" for some in found]
        lines.append(row([f"{size}, {'float32' if precision == 'no' else precision}", *cells]))
    return "\n".join(lines)


def memory_compared(path: str) -> str:
    """How near the counted peak is to what real steps took."""
    compared = json.loads((ROOT / path).read_text())["compared"]
    ratios = [r["peak"] / r["measured"]["peak"] for r in compared]
    return f"{len(ratios)} kinds of step: counted by measured from {min(ratios):.3f} to {max(ratios):.3f}."


def soak(path: str) -> str:
    """What happened to a run, and whether it ended as one that was left alone."""
    result = json.loads((ROOT / path).read_text())
    events = [event["event"] for event in result["events"]]
    kinds = {
        "killed": sum(event == "killed" for event in events),
        "killed while a checkpoint was written": sum("while it wrote" in event for event in events),
        "a checkpoint damaged": sum("was damaged" in event for event in events),
        "the disk full": sum("disk was full" in event for event in events),
    }
    lines = [row(["what happened", "times"]), row(["---"] * 2), *(row([name, str(n)]) for name, n in kinds.items())]
    minutes, equal = result["events"][-1]["minute"], "equal" if result["equal"] else "not equal"
    return "\n".join([*lines, row([f"after {minutes:.0f} minutes, weights, average, moments and log", equal])])


def result_of(path: str) -> dict[str, Any]:
    """The result of an experiment."""
    return json.loads((ROOT / path).read_text())  # type: ignore[no-any-return]


def experiment(path: str, *way: str) -> str:
    """The table of `fpdm experiment`: at each budget the best way, or one of them."""
    return markdown(result_of(path), *way)


def ratios(path: str, labels: str, others: str, *way: str) -> str:
    """The Frechet distances of models relative to those of others, named by label and parted by commas."""
    return comparison.ratios(result_of(path), labels.split(","), others.split(","), *way)


def best(path: str, *way: str) -> str:
    return comparison.best(result_of(path), *way)


def choices(steps: str, operations: str, other: str, way: str, *places: str) -> str:
    """Networks to choose; a place is a budget, a colon and a model's label."""
    parted = [(int(budget), label) for budget, _, label in (place.partition(":") for place in places)]
    return comparison.choices(result_of(steps), result_of(operations), result_of(other), parted, way)


def performance(path: str) -> str:
    """What was held against bars, and whether they hold."""
    lines = [row(["", "batch", "", "measured", "bar", ""]), row(["---"] * 6)]
    for part, found in json.loads((ROOT / path).read_text())["parts"].items():
        for one in found["rows"]:
            for name, bar, more in found["bars"]:
                value = one[name]
                spread = f" ({one['low']:.2f} to {one['high']:.2f})" if name == "ratio" else ""
                verdict = "holds" if (value >= bar if more else value <= bar) else "**fails**"
                limit = f"{'>=' if more else '<='} {bar:.3g}"
                early = f"{one['finished early']} of {one['of']} early" if "finished early" in one else ""
                lines.append(
                    row([part, early or str(one.get("batch", "")), name, f"{value:.3g}{spread}", limit, verdict])
                )
    return "\n".join(lines)


def parts_of(path: str, part: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / path).read_text())["parts"][part]["rows"]  # type: ignore[no-any-return]


def int8(path: str) -> str:
    """How many times as fast as float32 calls of the network are."""
    names = {"int8": "not compiled", "compiled float32": "compiled float32", "compiled int8, to that": "ratio",
             "a linear layer alone": "linear layer"}  # fmt: skip
    lines = [row(["batch", *names]), row(["---"] * (1 + len(names)))]
    for one in parts_of(path, "int8"):
        lines.append(row([str(one["batch"]), *(f"{one[name]:.2f}" for name in names.values())]))
    return "\n".join(lines)


def precision(path: str) -> str:
    """Quality by precision and budget, with what it is to float32."""
    rows = json.loads((ROOT / path).read_text())["rows"]
    budgets, kinds = sorted({r["budget"] for r in rows}), list(dict.fromkeys(r["dtype"] for r in rows))
    found = {(r["dtype"], r["budget"]): f"{r['value']:.3f} ({r['to float32']:.3f})" for r in rows}
    lines = [row(["block passes", *map(str, budgets)]), row(["---"] * (1 + len(budgets)))]
    return "\n".join([*lines, *(row([kind, *(found[kind, b] for b in budgets)]) for kind in kinds)])


def continuous(path: str) -> str:
    """What other ways to draw take, relative to continuous batching."""
    lines = [row(["", "drawn otherwise", "seconds, to those of continuous batching"]), row(["---"] * 3)]
    for one in parts_of(path, "continuous"):
        lines += [row([one["what"], way, f"{seconds:.2f}"]) for way, seconds in one["of others"].items()]
    return "\n".join(lines)


def spent(path: str) -> str:
    """Where seconds go."""
    names = ["products", "attention", "others", "products, of the matrix rate"]
    lines = [row(["", "batch", *names]), row(["---"] * (2 + len(names)))]
    for one in parts_of(path, "spent"):
        lines.append(row([one["what"], str(one["batch"]), *(f"{one[name]:.2f}" for name in names)]))
    return "\n".join(lines)


def waiting(path: str) -> str:
    """How long trainings wait for their data."""
    lines = [
        row(["data", "workers", "images per second trained", "of the time waiting", "images per second, loaded only"])
    ]
    lines.append(row(["---"] * 5))
    for one in parts_of(path, "waiting"):
        told = [f"{one['trained']:.0f}", f"{one['waited']:.1%}", f"{one['delivered']:,.0f}"]
        lines.append(row([one["data"], str(one["workers"]), *told]))
    return "\n".join(lines)


TABLES: dict[str, Callable[..., str]] = {
    "experiment": experiment,
    "ratios": ratios,
    "best": best,
    "choices": choices,
    "metrics": metrics,
    "models": models,
    "ladder": ladder,
    "tuned": tuned,
    "solver_images": solver_images,
    "solvers": solvers,
    "stopping": stopping,
    "gradients": gradients,
    "memory": memory,
    "memory_compared": memory_compared,
    "performance": performance,
    "int8": int8,
    "precision": precision,
    "continuous": continuous,
    "spent": spent,
    "waiting": waiting,
    "soak": soak,
}


def rendered(text: str) -> str:
    def replaced(match: re.Match[str]) -> str:
        name, *arguments = match[1].split()
        return f"<!-- table {match[1]} -->\n{TABLES[name](*arguments)}\n<!-- end -->"

    return re.sub(r"<!-- table (.*?) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for page in PAGES:
        text = page.read_text()
        if check and rendered(text) != text:
            sys.exit(f"{page.relative_to(ROOT)} differs from the kept results: run python scripts/write_tables.py")
        page.write_text(rendered(text))
