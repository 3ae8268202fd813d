"""What a run writes: log, sample grids, checkpoints, the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate.utils import gather_object
from PIL import Image

from fpdm.diffusion import for_sampling
from fpdm.files import read_json, write_json
from fpdm.imaging import grid
from fpdm.models import Denoiser, FixedPointDiT
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.training import checkpoints
from fpdm.training.devices import whole
from fpdm.training.halts import lacks_memory
from fpdm.training.rundir import PARTIAL

if TYPE_CHECKING:
    from fpdm.training.loop import Trainer

GRID_IMAGES = 40
DECODED = 8  # at once, by an autoencoder: it takes a fifth of a gigabyte for an image of 256 x 256 pixels
TRAINING = "training.json"  # in the pipeline folder: the step and config it comes from


class Saver:
    """Writes for a `Trainer`, and restores it. Every method is called by all processes; the main one writes."""

    def __init__(self, run: "Trainer"):
        self.run, self.dir, self.accelerator, self.settings = run, run.dir, run.accelerator, run.config.run
        # Sharded weights are gathered into a network of their own, to be sampled from and saved.
        self.gathered = run.parts.fresh() if self.settings.sharding == "fsdp" else None

    def append_log(self, entry: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.writing("a line of the log"):
                self.dir.append_log(entry)
        numbers = {key: value for key, value in scalars(entry).items() if key not in ("step", "seconds", PARTIAL)}
        with self.writing("a line for the tracker"):
            self.accelerator.log(numbers, step=entry["step"])

    def save_grid(self) -> None:
        """Images of the averaged weights, at fixed seeds. Without the memory for them there are none, which is told."""
        model = self.averaged()
        if model is None or not self.accelerator.is_main_process:
            return
        try:
            images = self._drawn(self._pipeline(model))
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            self.accelerator.print(f"\nat step {self.run.step}, there is not enough memory for a grid of samples")
            return
        with self.writing("a grid of samples"):
            grid(images, columns=10).save(self.dir.samples / f"step-{self.run.step:08d}.png")

    def _drawn(self, pipe: FixedPointDiTPipeline) -> list[Image.Image]:
        """The images of a grid, a part at a time."""
        pipe.set_progress_bar_config(disable=True)
        classes, seed = pipe.transformer.config.num_classes, self.settings.seed
        budget = max(self.settings.sample_budget, pipe.plan(num_inference_steps=1).planned)
        drawn: list[Image.Image] = []
        size = GRID_IMAGES if pipe.vae is None else DECODED
        for first in range(0, GRID_IMAGES, size):
            part = range(first, min(first + size, GRID_IMAGES))
            labels = [i % classes for i in part] if classes else None
            drawn += pipe(labels, len(part), budget=budget, seed=seed, image_indices=part).images
        return drawn

    def save(self) -> None:
        run = self.run
        state = {
            "steps": run.config.optimizer.steps,
            "meters": self.accelerator.reduce(run.meters.sums, "mean").tolist(),
            "guard": run.guard.state(),
            "rollbacks": run.rollbacks,
            "broken": self.all_broken(),
        }
        main = self.accelerator.is_main_process
        tensors = checkpoints.gathered(run.net, run.ema.model, run.optimizer, keep=main)
        if self.accelerator.is_main_process:
            with self.writing("a checkpoint"):
                checkpoints.save(self.dir.checkpoints, run.step, tensors, state, self.settings.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def is_saved(self) -> bool:
        """Whether there is a checkpoint of this step."""
        return self.run.step in checkpoints.all_steps(self.dir.checkpoints)

    def sound_steps(self) -> list[int]:
        """The steps of the checkpoints from before any trouble."""
        return checkpoints.sound(self.dir.checkpoints)

    def restore(self, most: int | None = None) -> None:
        """Set the run to its newest checkpoint, of at most step `most`, if there is one, and the log with it.

        Raises ValueError where processes find different ones: their folder is not the same.
        """
        run = self.run
        found = checkpoints.newest(self.dir.checkpoints, self.accelerator.print, most)
        steps = set(gather_object([None if found is None else found[1]["step"]]))
        if len(steps) > 1:
            raise ValueError(
                f"the processes find different checkpoints in {self.dir.checkpoints}, those of steps {steps}: all must "
                "see one folder, on a disk that they share"
            )
        if found is not None:
            tensors, state = found
            checkpoints.restore(tensors, run.net, run.ema.model, run.optimizer)
            run.step, run.rollbacks = state["step"], state.get("rollbacks", 0)
            run.broken = dict.fromkeys(state["broken"])
            if "meters" in state:  # else an earlier version wrote it: the next line of the log covers fewer steps
                run.meters.restore(state["meters"])
                run.guard.restore(state["guard"])
        if self.accelerator.is_main_process:
            self.dir.cut_log(run.step, run.config.optimizer.steps)
        self.accelerator.wait_for_everyone()

    def export(self) -> None:
        """The averaged weights as a pipeline folder, with a note of what it was made from. Raises OSError if the
        disk is full, whatever else a full disk may lose: nothing comes after it."""
        model = self.averaged()

        def write(folder: Path) -> None:
            assert model is not None
            self._pipeline(model).save_pretrained(folder)
            write_json(folder / TRAINING, {"step": self.run.step, **self.run.config.to_dict()})

        if self.accelerator.is_main_process:
            try:
                checkpoints.replace_folder(self.dir.pipeline, write)
            except OSError as error:
                raise OSError(
                    f"the model cannot be written: {error}. Checkpoints are as they were: make room, and the same "
                    "command goes on"
                ) from error
        self.accelerator.wait_for_everyone()

    def exported_step(self) -> int | None:
        note = self.dir.pipeline / TRAINING
        return read_json(note)["step"] if note.is_file() else None

    def all_broken(self) -> list[str]:
        """The unreadable images that any process has met."""
        return sorted(set(gather_object(list(self.run.broken))))

    def averaged(self) -> Denoiser | None:
        """The network with the averaged weights, whole; None where it is sharded and this is not the main process."""
        if self.gathered is None:
            return self.run.ema.model
        weights = {name: whole(p).cpu() for name, p in self.run.ema.model.named_parameters()}
        if not self.accelerator.is_main_process:
            return None
        self.gathered.load_state_dict(weights)
        return self.gathered.to(self.accelerator.device).eval()

    def _pipeline(self, model: Denoiser) -> FixedPointDiTPipeline:
        parts = self.run.parts
        names = parts.source.class_names if model.config.num_classes else None
        config = parts.config
        never = config.data.class_dropout == 0 and config.run.init_from is None  # which may know how to do without
        return FixedPointDiTPipeline(
            cast(FixedPointDiT, model),
            for_sampling(parts.schedule),
            vae=parts.vae,
            class_names=names,
            only_classes=never and model.config.num_classes > 0,
        )

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """A disk that is full ends the run, or loses it only what is written within, as was asked for."""
        try:
            yield
        except OSError as error:
            if self.settings.on_full_disk == "stop":
                raise
            self.accelerator.print(f"\nat step {self.run.step}, {what} was lost: {error}")


def scalars(entry: dict[str, Any], before: str = "") -> dict[str, float]:
    """The numbers in a line of the log, by name; those of lists by name and place."""
    found: dict[str, float] = {}
    for key, value in entry.items():
        if isinstance(value, list):
            value = {str(i): number for i, number in enumerate(value)}
        if isinstance(value, dict):
            found |= scalars(value, f"{before}{key}/")
        elif isinstance(value, int | float):
            found[before + key] = value
    return found
