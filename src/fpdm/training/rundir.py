"""The folder of a run: config, log, checkpoints, sample grids, and at the end the model.

runs/NAME/config.json, log.jsonl, checkpoints/, samples/, pipeline/
"""

import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from fpdm.data import holds_latents
from fpdm.data.open import kind_of
from fpdm.files import hold, is_free, is_inside, read_json, steps_in, write_aside, write_json
from fpdm.training.checkpoints import planned_steps
from fpdm.training.config import Config, differences

# In the last line of a log, where it is of fewer steps than the others. Where more are asked for, these join them in
# the next line, and it goes: the log is as if the run had not ended there.
PARTIAL = "partial"


class RunDir:
    """A run's folder, new or to be gone on with. One without a checkpoint takes any config: there is nothing in it to
    lose, and the settings that it failed with, a batch too large for instance, are not to bind it.

    Raises ValueError if it belongs to another config or other data, naming what differs; OSError if it cannot be
    written.

    step          of its newest checkpoint, 0 without one
    former_steps  how many it was to have when that was written; None without a checkpoint
    """

    def __init__(self, path: str | Path, config: Config, fingerprint: str):
        self.path = Path(path)
        self.checkpoints, self.samples = self.path / "checkpoints", self.path / "samples"
        self.pipeline, self.log = self.path / "pipeline", self.path / "log.jsonl"
        settings = self.path / "config.json"
        new = {**config.to_dict(), "data_fingerprint": fingerprint}
        self.step, self.former_steps = max(steps_in(self.checkpoints), default=0), None
        self._anew = False
        if settings.is_file():
            old = read_json(settings)
            self._compare(old, new)
            if self.step:  # not those of the config: a start that finds all done has trained nothing by its own
                self.former_steps = planned_steps(self.checkpoints, self.step) or old["optimizer"]["steps"]
        elif not is_free(self.path):
            raise ValueError(f"{self.path} is there already and is not a run: choose another --name")
        self._new = new

    def _begun(self) -> bool:
        """Whether there is anything to lose: a checkpoint, even a damaged one, or a model left alone by them."""
        return self.pipeline.exists() or bool(steps_in(self.checkpoints))

    def create(self) -> None:
        """Make the folders and write the config. Called by one process only.

        Raises ValueError if another command is at work in them.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._held = hold(self.path)  # as long as this object lives
        if self._anew:
            self._clear()
        for folder in (self.checkpoints, self.samples):
            folder.mkdir(parents=True, exist_ok=True)
        if self.step <= self._new["optimizer"]["steps"]:  # else more are done already, and nothing will be
            write_json(self.path / "config.json", self._new)

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        changed = [f"{name} was {was!r}, is {now!r}" for name, (was, now) in differences(old, new).items()]
        if old.get("data_fingerprint") != new["data_fingerprint"]:
            changed.append("the images are others")
        if changed and self._begun():
            raise ValueError(
                f"{self.path} belongs to another run: {'; '.join(changed)}. "
                "Give the same settings to go on with it, or another --name to start anew"
            )
        self._anew = bool(changed)

    def _clear(self) -> None:
        """Remove what a run of another config left that had no checkpoint: its log and grids are not the new one's."""
        if self._begun():  # by a run that was at work until a moment ago
            raise ValueError(f"{self.path} belongs to another run, which has just saved: choose another --name")
        self.log.unlink(missing_ok=True)
        for folder in (self.samples, self.path / "tensorboard"):
            shutil.rmtree(folder, ignore_errors=True)

    def cut_log(self, step: int, last: int) -> None:
        """Drop what the log says of steps after `step`, a torn last line too; and a partial one before step `last`."""
        if not self.log.is_file():
            return
        kept = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # torn, on a full disk or by a kill, or damaged
            if entry["step"] > step:
                break
            if step >= last or PARTIAL not in entry:
                kept.append(line + "\n")
        write_aside(self.log, lambda aside: aside.write_text("".join(kept)))

    def append_log(self, entry: dict[str, Any]) -> None:
        line = json.dumps(finite(entry), allow_nan=False) + "\n"
        size = self.log.stat().st_size if self.log.is_file() else 0
        try:
            with self.log.open("a") as file:
                file.write(line)
        except OSError:
            with suppress(OSError):
                os.truncate(self.log, size)  # half a line would join the next one
            raise


def finite(value: Any) -> Any:
    """`value` with null for numbers that JSON does not know: infinite ones, and those that are none."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_apart(folder: Path, data: str | None) -> None:
    """Raises ValueError for a run in a folder of images or shards, whose sample grids would join what it trains on.
    Latents and IDX files are known by their names: nothing joins them."""
    if data is None or not is_inside(folder, Path(data)) or holds_latents(Path(data)):
        return
    if kind_of(data) in ("folder", "shards"):
        raise ValueError(
            f"{folder} is in {data}, the folder of the images, which its own would join: choose another --runs-dir"
        )


def check_space(folder: Path, model: nn.Module, checkpoints: int) -> None:
    """Raises OSError if the disk has no room for the checkpoints and the model. A checkpoint holds weights, average and
    AdamW's two moments in float32; one more than are kept is there for a moment."""
    needed = 4 * sum(p.numel() for p in model.parameters()) * (4 * (checkpoints + 1) + 2)
    kept = (path for part in ("checkpoints", "pipeline") for path in (folder / part).rglob("*.safetensors"))
    needed -= sum(path.stat().st_size for path in kept)  # of a run that is gone on with
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            f"{there} has {free / 1e6:.0f} MB free; {checkpoints} checkpoints and the model need "
            f"{needed / 1e6:.0f} MB: make room, choose another --runs-dir, or keep fewer with --keep-checkpoints"
        )
