"""Tables and plots of an experiment's result.json: as text, as Markdown, and as a picture."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from fpdm.evaluation.result import significant
from fpdm.experiments.page import COLOURS
from fpdm.files import write_aside

Row = dict[str, Any]
LINES = (("-", "o"), ("--", "s"), (":", "^"))  # styles and markers, each for as many lines as there are colours
MANY = 6  # more lines than this have their legend beside them


def reached(result: Row, name: str) -> list[Any]:
    """Of the table's "ways" or "budgets" those that anything has been measured of, so far; all, as long as none has."""
    there = {point[name.removesuffix("s")] for point in result["points"]}
    return [value for value in result[name] if value in there] or list(result[name])


def compared(result: Row) -> list[str]:
    """The ways that are shown each for itself: those of several models, unless each way has budgets of its own."""
    places = {(point["way"], point["budget"]) for point in result["points"]}
    several = len(result["models"]) > 1 and len(places) > len({budget for _, budget in places})
    return reached(result, "ways") if several else []


def markdown(result: Row, way: str | None = None) -> str:
    """The Frechet distance by model (or by way, where there is but one model) and budget: over trainings the mean, and
    the smallest and largest. The lowest mean at each budget is bold.

    way  of drawing; None takes at each budget the one that was best when plans were chosen
    """
    heads, rows = table_rows(result, way)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_text(result: Row) -> str:
    """The same for a terminal."""
    heads, rows = table_rows(result, None)
    rows = [[cell.replace("**", "") for cell in row] for row in [heads, *rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return f"{result['question']}\n\n{table}"


def table_rows(result: Row, way: str | None) -> tuple[list[str], list[list[str]]]:
    budgets, lines = reached(result, "budgets"), list(lines_of(result, way))
    means = [{b: mean(values[b]) for b in budgets if values.get(b)} for _, _, values in lines]
    least = {b: min((m[b] for m in means if b in m), default=None) for b in budgets}
    rows = []
    for (_, name, values), of_line in zip(lines, means, strict=True):
        cells = [cell(values.get(b, []), of_line.get(b) == least[b]) for b in budgets]
        rows.append([name, *cells])
    if result["real"]:
        rows.append(["real images", *[significant(next(iter(result["real"].values())))] * len(budgets)])
    return ["block passes", *map(str, budgets)], rows


def cell(values: list[float], lowest: bool) -> str:
    """Mean, and the range where there are several; nothing where there are none."""
    if not values:
        return ""
    text = significant(mean(values))
    if lowest:
        text = f"**{text}**"
    return text if len(values) == 1 else f"{text} ({significant(min(values))} to {significant(max(values))})"


def lines_of(result: Row, way: str | None) -> Iterator[tuple[str, str, dict[int, list[float]]]]:
    """Label, name and distances by budget of each line of a table: one per model, or one per way."""
    models = {row["model"] for row in result["points"]}
    if way is None and len(result["models"]) == 1:
        for name in reached(result, "ways"):
            yield name, name, values_of(p for p in result["points"] if p["way"] == name)
        return
    for label, title in result["models"].items():
        if label not in models:
            continue
        parameters = next(t["parameters"] for t in result["trainings"] if t["model"] == label)
        own = [p for p in result["points"] if p["model"] == label and (p["best"] if way is None else p["way"] == way)]
        yield label, f"{title} ({parameters / 1e6:.2f} M)", values_of(own)


def values_of(points: Iterable[Row]) -> dict[int, list[float]]:
    """Budget -> a distance per training. Where there are points of several ways, those of the way that most trainings
    have, which is the one that was chosen."""
    found: dict[int, dict[str, list[float]]] = {}
    for point in points:
        found.setdefault(point["budget"], {}).setdefault(point["way"], []).append(distance(point))
    return {budget: max(ways.values(), key=len) for budget, ways in found.items()}


def distance(point: Row) -> float:
    return float(next(iter(point["measures"].values()))[0])


def plot(result: Row, path: Path) -> None:
    """Quality against budget: a panel per way, a line per model; or one panel, with a line per way of one model, or a
    line per model where each way has budgets of its own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator

    ways: list[str | None] = [*compared(result)] or [None]
    figure, axes = plt.subplots(
        1, len(ways), figsize=(1.6 + 4.4 * max(len(ways), 1.4), 4.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, way in zip(axes[0], ways, strict=True):
        for place, (_, name, values) in enumerate(lines_of(result, way)):
            budgets = sorted(values)
            colour, (line, marker) = COLOURS[place % len(COLOURS)], LINES[place // len(COLOURS) % len(LINES)]
            means = [mean(values[b]) for b in budgets]
            axis.plot(budgets, means, marker=marker, markersize=4, linewidth=1.4, color=colour, linestyle=line,
                      label=name)  # fmt: skip
            ends = [[f(values[b]) for b in budgets] for f in (min, max)]
            axis.fill_between(budgets, *ends, color=colour, alpha=0.15, linewidth=0)
        if result["real"]:
            axis.axhline(next(iter(result["real"].values())), color="black", linewidth=0.8, linestyle=":",
                         label="real images")  # fmt: skip
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="block passes per image",
            title=way if len(ways) > 1 else result["question"],
        )
        axis.set_xticks(budgets := reached(result, "budgets"), list(map(str, budgets)))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"{next(iter(result['real'] or {'distance': 0}))}, lower is better")
    names = axes[0][-1].get_legend_handles_labels()[1]
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(names) > MANY else {}  # else upon the lines
    axes[0][-1].legend(fontsize=8, **beside)
    write_aside(path, lambda aside: figure.savefig(aside, format="png", dpi=110))
    plt.close(figure)


def write_page(result: Row, out: Path) -> Path:
    """Write OUT/table.md, and OUT/plot.png which it shows."""
    plot(result, out / "plot.png")
    parts = [f"# {result['question']}", markdown(result), "![quality against budget](plot.png)"]
    parts += [f"## {way}\n\n{markdown(result, way)}" for way in compared(result)]
    path = out / "table.md"
    write_aside(path, lambda aside: aside.write_text("\n\n".join(parts) + "\n", "utf-8"))
    return path
