"""Plots of an experiment's result.json: quality against budget, or row by row where there are too many for lines."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from fpdm.experiments.page import COLOURS
from fpdm.experiments.rows import Line, Row, compared, lines_of, reached
from fpdm.files import write_aside

# Lines and markers, of explicit networks or not, each for as many lines as there are colours.
STYLES = {False: (("-", "o"), (":", "^")), True: (("--", "s"), ("-.", "D"))}
BESIDE = 6  # more lines than this have their legend beside them
CURVES = 9  # more than this are not told apart: they have a row each
FAR = 2.0  # times the lowest distance at a budget; what lies beyond is marked at the edge of its row


def plot(result: Row, path: Path) -> None:
    """Write a picture of the distances: means over trainings, and their ranges as bands or bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = rows(result) if len(list(lines_of(result, None))) > CURVES else curves(result)
    write_aside(path, lambda aside: figure.savefig(aside, format="png", dpi=110))
    plt.close(figure)


def curves(result: Row) -> Any:
    """Distance against budget: a panel per way, a line per model; or one panel, with a line per way of one model, or a
    line per model where each way has budgets of its own."""
    import matplotlib.pyplot as plt

    ways: list[str | None] = [*compared(result)] or [None]
    size = (1.6 + 4.4 * max(len(ways), 1.4), 4.6)
    figure, axes = plt.subplots(1, len(ways), figsize=size, layout="constrained", sharey=True, squeeze=False)
    budgets = reached(result, "budgets")
    for axis, way in zip(axes[0], ways, strict=True):
        drawn = Counter[bool]()
        for line in lines_of(result, way):
            explicit = line[1].startswith("DiT")
            draw_curve(axis, line, explicit, drawn[explicit])
            drawn[explicit] += 1
        if result["real"]:
            axis.axhline(real(result), color="black", linewidth=0.8, linestyle=":", label="real images")
        title = way if len(ways) > 1 else result["question"]
        axis.set(xscale="log", yscale="log", xlabel="block passes per image", title=title)
        axis.set_xticks(budgets, list(map(str, budgets)))
        plain_ticks(axis, axis.yaxis, (1, 2, 5))
    axes[0][0].set_ylabel(measure(result))
    names = axes[0][-1].get_legend_handles_labels()[1]
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(names) > BESIDE else {}  # else upon the lines
    axes[0][-1].legend(fontsize=8, **beside)
    return figure


def draw_curve(axis: Any, line: Line, explicit: bool, place: int) -> None:
    """`place` counts the lines of its kind."""
    _, name, values = line
    budgets, colour, styles = sorted(values), COLOURS[place % len(COLOURS)], STYLES[explicit]
    style, marker = styles[place // len(COLOURS) % len(styles)]
    means, least, most = ([f(values[b]) for b in budgets] for f in (mean, min, max))
    axis.plot(budgets, means, marker=marker, markersize=4, linewidth=1.4, color=colour, linestyle=style, label=name)
    axis.fill_between(budgets, least, most, color=colour, alpha=0.15, linewidth=0)


def rows(result: Row) -> Any:
    """A row per line of the table and a panel per budget, each with a scale of its own: dots are means, bars ranges."""
    import matplotlib.pyplot as plt

    budgets, lines = reached(result, "budgets"), list(lines_of(result, None))
    size = (3.2 + 2.1 * len(budgets), 1.4 + 0.24 * len(lines))
    figure, axes = plt.subplots(1, len(budgets), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis, budget in zip(axes[0], budgets, strict=True):
        draw_rows(axis, [values.get(budget, []) for _, _, values in lines])
        if result["real"]:
            axis.axvline(real(result), color="black", linewidth=0.8, linestyle=":")
        axis.set(title=f"{budget} block passes")
    axes[0][0].set_yticks(range(len(lines)), [name for _, name, _ in lines], fontsize=8)
    axes[0][0].invert_yaxis()
    figure.suptitle(result["question"])
    notes = [*(["dotted: real images"] if result["real"] else []), f"\u25b8: above {FAR:g} times the lowest"]
    figure.supxlabel(f"{measure(result)} ({'; '.join(notes)})", fontsize=9)
    return figure


def draw_rows(axis: Any, column: Sequence[list[float]]) -> None:
    """One budget; nothing in the rows that have no values."""
    there = [(place, values) for place, values in enumerate(column) if values]
    lowest = min((mean(values) for _, values in there), default=1.0)
    edge = FAR * lowest
    axis.set(xscale="log", xlim=(0.98 * min((min(v) for _, v in there), default=1.0), 1.04 * edge))
    for place, values in there:
        colour = COLOURS[1] if mean(values) == lowest else COLOURS[0]
        if mean(values) > edge:
            axis.plot(edge, place, marker=">", markersize=5, color=colour)
        else:
            axis.plot(mean(values), place, marker="o", markersize=5, color=colour)
            axis.plot([min(values), max(values)], [place, place], linewidth=1.6, alpha=0.5, color=colour)
    plain_ticks(axis, axis.xaxis, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
    axis.tick_params(axis="x", labelsize=8)


def plain_ticks(axis: Any, along: Any, multiples: Sequence[float]) -> None:
    """Ticks of a logarithmic scale written as decimals, and a grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    along.set_major_locator(LogLocator(subs=multiples))
    along.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def real(result: Row) -> float:
    return float(next(iter(result["real"].values())))


def measure(result: Row) -> str:
    return f"{next(iter(result['real'] or {'distance': 0}))}, lower is better"
