"""The report of a sweep: one HTML file without scripts or links elsewhere, in which each point opens its images.

A point of a plot is a link to an element that holds its grid, which CSS shows while it is the target of the page's
address. So the file works from a disk, in a mail and on any server.
"""

import base64
import html
import io
import re
from collections.abc import Callable
from importlib.resources import files
from itertools import groupby
from math import inf
from pathlib import Path
from statistics import mean
from string import Template
from typing import Any

from PIL import Image

from fpdm.evaluation import Evaluation, Measure
from fpdm.evaluation.result import significant
from fpdm.files import write_aside

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito 2008
MARKERS = {"ddpm": "o", "ddim": "s", "dpm++": "^", "unipc": "v", "heun": "*"}
SIGNS = {"ddpm": "&#9679;", "ddim": "&#9632;", "dpm++": "&#9650;", "unipc": "&#9660;", "heun": "&#9733;"}  # in text
AXES = {
    "passes": "transformer block passes per image",
    "operations": "operations per image",
    "seconds": "seconds per image",
}
SHOWN_WIDTH = 640  # pixels, as in page.html
Row = dict[str, Any]


def write_report(points: list[Row], out: Path) -> Path:
    """Write OUT/report.html of all points, whose grids are in OUT/grids. Needs matplotlib."""
    rows = [{**point, "evaluation": Evaluation.from_dict(point["evaluation"])} for point in points]
    distance, *names = dict.fromkeys(m.name for row in rows for m in row["evaluation"].measures)
    quality = "".join(plot(rows, x, distance) for x in AXES)
    others = "".join(plot(rows, "passes", name) for name in names)
    page = Template((files("fpdm.experiments") / "page.html").read_text("utf-8")).substitute(
        title=html.escape(f"Quality against compute: {', '.join(dict.fromkeys(row['model'] for row in rows))}"),
        summary=summary(rows),
        distance=html.escape(distance),
        quality=quality,
        others=others,
        legend=legend(rows),
        table=table(sorted(rows, key=lambda row: row["budget"]), [distance, *names]),
        overlays="".join(overlay(row, out / "grids" / f"{row['key']}.png") for row in rows),
        conditions=conditions(rows),
    )
    path = out / "report.html"
    write_aside(path, lambda aside: aside.write_text(page, "utf-8"))
    return path


def summary(rows: list[Row]) -> str:
    first: Evaluation = rows[0]["evaluation"]
    size = first.identity["preprocessing"]["size"]
    counts = sorted({row["evaluation"].samples for row in rows})
    return html.escape(
        f"{len(rows)} points; {' or '.join(f'{n:,}' for n in counts)} samples each against {first.real['images']:,} "
        f"images of {first.real['name']}, {size} x {size}, by features of {first.identity['features']['network']}. "
        f"Bars are 95% intervals, and dashed lines are {first.compared_with}."
    )


def measure_of(row: Row, name: str) -> Measure | None:
    return next((measure for measure in row["evaluation"].measures if measure.name == name), None)


def plot(rows: list[Row], x: str, name: str) -> str:
    """One plot as SVG: a line per model and scheduler, through the best point at each budget; each point a link."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if measure_of(row, name) is not None]
    measured: Callable[[Row], Measure] = lambda row: measure_of(row, name)  # type: ignore[assignment,return-value]  # noqa: E731
    models = list(dict.fromkeys(row["model"] for row in rows))
    distance = rows[0]["evaluation"].measures[0].name == name
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": x + name, "font.size": 10}):
        figure, axis = plt.subplots(figsize=(6.2, 4.0), layout="constrained")
        for (model, scheduler), group in groupby(rows, key=lambda row: (row["model"], row["scheduler"])):
            series = list(group)
            colour, marker = COLOURS[models.index(model) % len(COLOURS)], MARKERS.get(scheduler, "D")
            best = best_of(series, x, measured)
            axis.plot([place for place, _ in best], [value for _, value in best], color=colour,
                      marker=marker, markersize=5, linewidth=1.1)  # fmt: skip
            values = [measured(row) for row in series]
            spread = [[max(0, m.value - m.low) for m in values], [max(0, m.high - m.value) for m in values]]
            axis.errorbar([row[x] for row in series], [m.value for m in values], spread, fmt="none", ecolor=colour,
                          alpha=0.4, linewidth=1)  # fmt: skip
            axis.scatter([row[x] for row in series], [m.value for m in values], s=80, color=colour, marker=marker,
                         alpha=0.35, linewidth=0, urls=[f"#{row['key']}" for row in series])  # fmt: skip
        axis.axhline(measured(rows[0]).floor, color="#666", linestyle="--", linewidth=1)
        logarithmic(axis.xaxis, [row[x] for row in rows])
        if distance:
            logarithmic(axis.yaxis, [measured(row).value for row in rows])
        axis.set(xlabel=AXES[x], ylabel=name)
        axis.margins(y=0.08)  # the floor stays clear of the frame
        axis.grid(alpha=0.25, which="both")
        if x == "passes":
            budgets = sorted({row["budget"] for row in rows})
            axis.set_xticks(budgets, [str(n) for n in budgets], rotation=45 if len(budgets) > 8 else 0)
            axis.minorticks_off()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    return f"<figure>{linked(buffer.getvalue(), rows, name)}</figure>"


def logarithmic(axis: Any, values: list[float]) -> None:
    """A logarithmic scale with plain numbers, for values over a range that calls for one; else it stays linear."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if min(values) <= 0 or max(values) < 8 * min(values):
        return
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(rows: list[Row]) -> str:
    """What colours and marks mean, once for all plots."""
    models = dict.fromkeys(row["model"] for row in rows)
    schedulers = dict.fromkeys(row["scheduler"] for row in rows)
    colours = [f'<span style="color:{COLOURS[i % len(COLOURS)]}">&#9473;&#9473;</span> {html.escape(model)}'
               for i, model in enumerate(models)]  # fmt: skip
    marks = [f"<span>{SIGNS.get(scheduler, '&#9670;')}</span> {html.escape(scheduler)}" for scheduler in schedulers]
    return "".join(f"<li>{item}</li>" for item in [*colours, *marks])


def best_of(series: list[Row], x: str, measured: Callable[[Row], Measure]) -> list[tuple[float, float]]:
    """Of each budget the plan with the best mean over its seeds: where it is and that mean, in order. The best point of
    several seeds would be a lucky one."""
    plans: dict[tuple[Any, ...], list[Row]] = {}
    for row in series:
        plans.setdefault((row["budget"], str(row["iterations"]), row["plan"], *how({**row, "seed": 0})), []).append(row)
    found: dict[int, tuple[float, float, float]] = {}
    for (budget, *_), rows in plans.items():
        m, value = measured(rows[0]), mean(measured(row).value for row in rows)
        worse = {"higher": -value, "lower": value, "floor": abs(value - m.floor)}[m.better]
        found[budget] = min(found.get(budget, (inf, 0, 0)), (worse, mean(row[x] for row in rows), value))
    return [(place, value) for _, (_, place, value) in sorted(found.items())]


def linked(svg: str, rows: list[Row], name: str) -> str:
    """The SVG element alone; its links stay on the page, and tell what they are of when pointed at."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(' target="_blank"', "")
    tips = {row["key"]: tip(row, name) for row in rows}

    def with_tip(found: re.Match[str]) -> str:
        key = html.unescape(found[1])
        return f'<a href="#{html.escape(key)}"><title>{html.escape(tips[key])}</title>'

    return re.sub(r'<a xlink:href="#([^"]*)">', with_tip, svg)


def tip(row: Row, name: str) -> str:
    m = measure_of(row, name)
    assert m is not None
    return f"{row['model']}, {row['scheduler']}, {', '.join([row['plan'], *how(row)])}: {name} {significant(m.value)}"


def table(rows: list[Row], names: list[str]) -> str:
    heads = ["model", "scheduler", "plan", "passes", "operations", "s / image", *names]
    lines = [f"<tr>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>"]
    for row in rows:
        link = f'<a href="#{html.escape(row["key"])}">{html.escape(row["model"])}</a>'
        cells = [
            link, row["scheduler"], plan_of(row), f"{row['passes']:g}", f"{row['operations']:.3g}",
            significant(row["seconds"]),
        ]  # fmt: skip
        for name in names:
            m = measure_of(row, name)
            interval = "" if m is None else f"<small>{significant(m.low)} to {significant(m.high)}</small>"
            cells.append("" if m is None else f"{significant(m.value)}<br>{interval}")
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    found = [[m for row in rows if (m := measure_of(row, name)) is not None] for name in names]
    floors = [measures[0] for measures in found]
    cells = ["real images", "", "", "", "", "", *(m.real for m in floors)]
    lines.append(f"<tr class=floor>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def plan_of(row: Row) -> str:
    return html.escape(", ".join([row["plan"].rsplit(", ", 1)[0], *how(row)]))  # the passes have a column of their own


def how(row: Row) -> list[str]:
    """What of a point is not the default."""
    request = row["request"]  # of which points of an older version say only there what they are
    allocation, reuse, solver, seed = (
        row.get(name, request.get(name)) for name in ("allocation", "reuse", "solver", "seed")
    )
    reuse = {True: "plain", False: "none"}.get(reuse, reuse)
    parts = [
        "tuned" if row.get("tuned") else "",
        f"{allocation} allocation" if allocation not in (None, "constant") else "",
        f"{reuse} reuse" if reuse not in (None, "plain") else "",
        str(solver) if solver not in (None, "picard") else "",
        f"seed {seed}" if seed else "",
    ]
    return [part for part in parts if part]


def overlay(row: Row, grid: Path) -> str:
    """What is shown when a point is opened: its images, and its numbers."""
    picture = base64.b64encode(small(grid)).decode()
    evaluation: Evaluation = row["evaluation"]
    numbers = "".join(
        f"<tr><td>{html.escape(m.name)}</td><td>{significant(m.value)}</td>"
        f"<td>{significant(m.low)} to {significant(m.high)}</td><td>{m.real}</td></tr>"
        for m in evaluation.measures
    )
    diverged = f"<p>{row['diverged']} of the images diverged.</p>" if row["diverged"] else ""
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in evaluation.notes)
    return (
        f'<div class=overlay id="{html.escape(row["key"])}"><a class=back href="#_" aria-label=close></a><section>'
        f"<h2>{html.escape(row['model'])}, {html.escape(row['scheduler'])}</h2>"
        f"<p>{html.escape(', '.join([row['plan'], *how(row)]))}; {row['operations']:.3g} operations, "
        f"{significant(row['seconds'])} s per image"
        f" <a class=close href='#_'>close</a></p><div class=sides>"
        f'<img alt="the first images" src="data:image/png;base64,{picture}">'
        f"<div><table><tr><th></th><th>value</th><th>95% interval</th><th>real images</th></tr>{numbers}</table>"
        f"{diverged}{notes}</div></div></section></div>"
    )


def small(grid: Path) -> bytes:
    """A PNG no wider than it is shown: a page of many points of large images would be too large to open."""
    with Image.open(grid) as picture:
        if picture.width <= SHOWN_WIDTH:
            return grid.read_bytes()
        buffer, height = io.BytesIO(), round(picture.height * SHOWN_WIDTH / picture.width)
        picture.resize((SHOWN_WIDTH, height), Image.Resampling.LANCZOS).save(buffer, format="PNG")
    return buffer.getvalue()


def conditions(rows: list[Row]) -> str:
    """Under what all this was computed, each different one once."""
    seen: dict[str, None] = {}
    for row in rows:
        made, request = row["made_with"], row["request"]
        text = ", ".join(f"{name} {value}" for name, value in made.items())
        text += f"; guidance scale {request['guidance_scale']}"
        seen[text] = None
    sizes = {row["model"]: row["parameters"] for row in rows}
    listed = ", ".join(f"{model} {count:,}" for model, count in sizes.items())
    return "".join(f"<p>{html.escape(text)}</p>" for text in [f"Parameters: {listed}", *seen])
