"""Tables of an experiment's result.json, as text and as Markdown, and the page that has them with its plot."""

from pathlib import Path
from statistics import mean

from fpdm.evaluation.result import significant
from fpdm.experiments.plots import plot
from fpdm.experiments.rows import Row, compared, lines_of, reached
from fpdm.files import write_aside


def markdown(result: Row, way: str | None = None) -> str:
    """The Frechet distance by model (or by way, where there is but one model) and budget: over trainings the mean, and
    the smallest and largest. The lowest mean at each budget is bold. Rows and budgets of which nothing is measured are
    left out.

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
    lines = list(lines_of(result, way))
    there = reached(result, "budgets")
    budgets = [b for b in there if any(values.get(b) for _, _, values in lines)] or there
    means = [{b: mean(values[b]) for b in budgets if values.get(b)} for _, _, values in lines]
    least = {b: min((m[b] for m in means if b in m), default=None) for b in budgets}
    rows = []
    for (_, name, values), of_line in zip(lines, means, strict=True):
        cells = [cell(values.get(b, []), of_line.get(b) == least[b]) for b in budgets]
        if any(cells):
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


def write_page(result: Row, out: Path) -> Path:
    """Write OUT/table.md, and OUT/plot.png which it shows."""
    plot(result, out / "plot.png")
    parts = [f"# {result['question']}", markdown(result), "![quality against budget](plot.png)"]
    parts += [f"## {way}\n\n{markdown(result, way)}" for way in compared(result)]
    path = out / "table.md"
    write_aside(path, lambda aside: aside.write_text("\n\n".join(parts) + "\n", "utf-8"))
    return path
