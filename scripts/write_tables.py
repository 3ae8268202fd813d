"""Write the tables of the docs from kept results: what stands between `<!-- table NAME ... -->` and `<!-- end -->`.

python scripts/write_tables.py          writes docs/evaluation.md
python scripts/write_tables.py --check  fails if it would change anything
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fpdm.evaluation import Evaluation, Measure
from fpdm.evaluation.evaluate import significant

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs/evaluation.md",)
Point = dict[str, Any]


def points_of(folder: str) -> list[Point]:
    paths = sorted((ROOT / folder / "points").glob("*.json"))
    points = [json.loads(path.read_text()) for path in paths]
    return [{**point, "evaluation": Evaluation.from_dict(point["evaluation"])} for point in points]


def cell(m: Measure) -> str:
    return f"{significant(m.value)} ({significant(m.low)} to {significant(m.high)})"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


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


TABLES: dict[str, Callable[..., str]] = {"metrics": metrics, "models": models}


def rendered(text: str) -> str:
    def replaced(match: re.Match[str]) -> str:
        name, *arguments = match[1].split()
        return f"<!-- table {match[1]} -->\n{TABLES[name](*arguments)}\n<!-- end -->"

    return re.sub(r"<!-- table (.*?) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text()
        if "--check" in sys.argv[1:] and rendered(text) != text:
            sys.exit(f"{page.relative_to(ROOT)} differs from the kept results: run python scripts/write_tables.py")
        page.write_text(rendered(text))
