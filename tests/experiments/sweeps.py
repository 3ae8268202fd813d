"""Models and sweeps so small that a test can afford several."""

import json
from pathlib import Path
from typing import Any

import torch

from fpdm import DiT, FixedPointDiT, FixedPointDiTPipeline
from fpdm.diffusion import make_schedule
from tests.networks import SIZES, randomised

DIGITS = [str(digit) for digit in range(10)]


def save_pipeline(folder: Path, network: type = FixedPointDiT, factor: float = 1.0, **changes: Any) -> str:
    """A pipeline of digits whose weights were drawn at random, then multiplied by `factor`."""
    settings = {**SIZES, "num_classes": 10, **changes}
    model = randomised(network(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    names = DIGITS if settings["num_classes"] == 10 else None
    FixedPointDiTPipeline(model, make_schedule(), class_names=names).save_pretrained(folder)
    return str(folder)


def save_models(folder: Path) -> dict[str, str]:
    """label -> folder: one of two block passes and one more per iteration, and an explicit one of five."""
    return {
        "looped": save_pipeline(folder / "looped"),
        "plain": save_pipeline(folder / "plain", DiT, depth=5),
    }


def read_strictly(path: Path) -> Any:
    """JSON as its standard has it: Python's parser would take NaN and Infinity, too."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path.name} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def points_in(out: Path) -> dict[str, Any]:
    """What is known of each finished point, but how long it took and how many computed."""
    found = {}
    for path in (out / "points").iterdir():
        point = read_strictly(path)
        made = {name: value for name, value in point["made_with"].items() if name not in ("threads", "processes")}
        found[path.stem] = {**point, "made_with": made, "seconds": None}
    return found


def grids_in(out: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (out / "grids").iterdir()}


def times_of(out: Path) -> dict[str, list[int]]:
    """When the point and the grid of each finished point were written, in nanoseconds."""
    return {
        path.stem: [file.stat().st_mtime_ns for file in (path, out / "grids" / f"{path.stem}.png") if file.is_file()]
        for path in (out / "points").iterdir()
    }
