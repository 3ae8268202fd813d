"""The runs in a folder, and how they stand. Reads files only: runs that are training are not disturbed."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpdm.files import hold, read_json, steps_in


@dataclass(frozen=True)
class Standing:
    """One run.

    state    "training", "finished", "stopped" (to be gone on with), or "damaged"
    step     of the last line of the log, or the newest checkpoint where that is further on
    last     the last numbers of the log, by name
    age      seconds since the log was written to; None without one
    """

    name: str
    state: str
    step: int
    steps: int
    last: dict[str, Any]
    age: float | None


def standings(folder: Path) -> list[Standing]:
    """The runs right below `folder`, by name, or the one that it is. Raises ValueError if there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: name the folder of your runs (`fpdm train --runs-dir`)")
    return [standing(path) for path in (folder, *sorted(folder.iterdir())) if (path / "config.json").is_file()]


def standing(path: Path) -> Standing:
    """How the run in `path` stands."""
    path = path.resolve()
    log = path / "log.jsonl"
    last = numbers(log)
    age = time.time() - log.stat().st_mtime if log.is_file() else None
    step = max(int(last.get("step", 0)), *steps_in(path / "checkpoints"), 0)
    try:
        steps = int(read_json(path / "config.json")["optimizer"]["steps"])
    except (ValueError, KeyError, TypeError):
        return Standing(path.name, "damaged", step, 0, last, age)
    return Standing(path.name, _state(path, steps), step, steps, last, age)


def _state(path: Path, steps: int) -> str:
    try:
        if (path / ".lock").is_file():
            with hold(path):
                pass
    except ValueError:
        return "training"
    except OSError:
        pass  # a folder that cannot be written to
    try:
        return "finished" if read_json(path / "pipeline/training.json")["step"] >= steps else "stopped"
    except (OSError, ValueError, KeyError):
        return "stopped"


def numbers(log: Path) -> dict[str, Any]:
    """The last value of every number in a log; a torn line is passed over."""
    found: dict[str, Any] = {}
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        seen = entry.pop("validation", None)
        found |= entry | ({"validation_loss": seen["loss"]} if seen else {})
    return found
