"""The training loop.

A step is a function of (config, step number): what it trains on, adds, drops and iterates is keyed. So the state of a
run is its weights, their average, the optimiser's moments, and the sums that the next line of the log will report.
"""

import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from tqdm import tqdm

from fpdm.data import Batch, ImagePreparation, Slots, Stream, loader
from fpdm.devices import pick_device
from fpdm.files import read_json, write_json
from fpdm.imaging import grid
from fpdm.keyed import generator
from fpdm.models import Denoiser, FixedPointDiT
from fpdm.names import needs
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.training import checkpoints
from fpdm.training.build import Parts, build
from fpdm.training.config import Config
from fpdm.training.draws import draw
from fpdm.training.ema import Ema
from fpdm.training.interrupt import Interrupt, deferred_interrupts
from fpdm.training.rundir import RunDir

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
METERS = ("loss", "mse", "vlb", "grad_norm")
STATUS_EVERY = 10  # steps between looks, over all processes, at whether one was asked to stop
GRID_IMAGES = 40
TRAINING = "training.json"  # in the pipeline folder: the step and config it comes from


class Trainer:
    """One run, from config to pipeline folder. `run()` trains until done or interrupted, and may be called on a folder
    in any state: new, stopped or finished."""

    def __init__(self, config: Config, path: str | Path):
        self.config = config
        self.parts: Parts = build(config)
        self.accelerator = make_accelerator(config, Path(path))
        self._slots(0)  # refuses a batch that cannot be shared out
        self.dir = RunDir(path, config, self.parts.source.fingerprint)
        check_space(self.dir.path, self.parts.model, config.run.keep_checkpoints)
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        if self.accelerator.is_main_process:
            self.dir.create()
        self.accelerator.wait_for_everyone()

        device = self.accelerator.device
        self.parts.loss.to(device)
        self.net: Denoiser = self.parts.model.to(device).train()
        self.ema = Ema(self.net, config.optimizer.ema)
        optimizer = torch.optim.AdamW(
            self.net.parameters(),
            lr=config.optimizer.lr,
            betas=(0.9, config.optimizer.beta2),
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(self.net, optimizer)
        self.step = 0
        self.sums, self.summed = torch.zeros(len(METERS), device=device), 0  # of the steps since the last line logged
        self.broken: list[str] = []

    def summary(self) -> str:
        """What is about to be trained on what, in two lines."""
        source, optimizer, side = self.parts.source, self.config.optimizer, self.config.data.image_size
        parameters = sum(p.numel() for p in self.net.parameters())
        classes = self.net.config.num_classes
        return (
            f"{type(self.net).__name__}, {parameters / 1e6:.2f} M parameters, on {len(source):,} images of "
            f"{side} x {side} x {source.channels}, {f'{classes} classes' if classes else 'no classes'}\n"
            f"{optimizer.steps:,} steps of {optimizer.batch_size} images on {self.accelerator.device}, "
            f"in {self.dir.path}"
        )

    def run(self) -> str:
        """Train. Returns "finished", "interrupted", or "already finished" if there was nothing to do."""
        self._restore()
        last = self.config.optimizer.steps
        if self.step >= last:
            if self._exported_step() != self.step:
                self._export()
            return "already finished"
        with deferred_interrupts() as interrupt, self._tracker(), self._bar() as bar:
            asked = self._train(interrupt, bar)
            if self.step % self.config.run.checkpoint_every:
                self._save()
            self._export()
            self.broken = self._all_broken()  # while there are other processes to ask
        return "interrupted" if asked and self.step < last else "finished"

    def _train(self, interrupt: Interrupt, bar: tqdm) -> bool:
        """Steps until the last one or until asked to stop; whether it was asked."""
        run, began, first = self.config.run, time.perf_counter(), self.step
        stream = Stream(
            self.parts.source,
            ImagePreparation(self.config.data.image_size, self.config.data.crop, self.config.data.flip),
            batch_size=self.config.optimizer.batch_size,
            seed=run.seed,
        )
        slots = self._slots(self.step)
        batches = iter(loader(stream, slots, self.config.data.workers, self.accelerator.device.type == "cuda"))
        for _ in slots.steps:
            self._one_step([next(batches) for _ in range(slots.parts)])
            self.step += 1
            self.summed += 1
            bar.update()
            if self.step % run.log_every == 0:
                self._log(bar, time.perf_counter() - began, self.step - first)
            if self.step % run.sample_every == 0:
                self._save_grid()
            if self.step % run.checkpoint_every == 0:
                self._save()
            if self._asked_to_stop(interrupt):
                return True
        return False

    def _one_step(self, batches: list[Batch]) -> None:
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Drawn once per step and alike on all processes, so that all do the same work.
        solve = self.parts.solve(generator(self.config.run.seed, "iterations", self.step))
        for i, batch in enumerate(batches):
            assert batch.step == self.step, f"a batch of step {batch.step} came at step {self.step}"
            if batch.failure is not None:
                raise ValueError(batch.failure)
            self.broken += [name for name in batch.broken if name not in self.broken]
            ready = i == len(batches) - 1
            with nullcontext() if ready else self.accelerator.no_sync(self.model):
                self._backward(batch, solve, 1 / len(batches))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.grad_clip or math.inf)
        self.sums[METERS.index("grad_norm")] += norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.net, self.step + 1)

    def _backward(self, batch: Batch, solve: dict[str, Any], share: float) -> None:
        config, device = self.config, self.accelerator.device
        chance = draw(
            config.run.seed,
            self.step,
            batch.slots,
            tuple(batch.images.shape[1:]),
            self.parts.loss.num_timesteps,
            config.data.class_dropout,
        )
        x0, noise = batch.images.to(device, non_blocking=True), chance.noise.to(device, non_blocking=True)
        labels = batch.labels.masked_fill(chance.dropped, self.net.null_class)
        if self.net.config.num_classes == 0:
            labels = torch.zeros_like(labels)
        t = chance.timesteps.to(device)
        output = self.model(self.parts.loss.noisy(x0, noise, t), t, labels.to(device), **solve)
        loss = self.parts.loss(output.sample.float(), x0, noise, t)
        self.accelerator.backward(loss.total.mean() * share)
        terms = torch.stack([loss.total.detach().mean(), loss.mse.mean(), loss.vlb.mean()])
        self.sums[: len(terms)] += terms * share

    def _slots(self, first: int) -> Slots:
        optimizer, processes = self.config.optimizer, self.accelerator
        return Slots(
            first,
            optimizer.steps,
            optimizer.batch_size,
            optimizer.accumulation,
            processes.process_index,
            processes.num_processes,
        )

    def _asked_to_stop(self, interrupt: Interrupt) -> bool:
        if self.accelerator.num_processes == 1:
            return interrupt.asked
        if self.step % STATUS_EVERY:
            return False
        flag = torch.tensor(float(interrupt.asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    # --- what is written -------------------------------------------------------------------------------------------

    def _log(self, bar: tqdm, seconds: float, steps: int) -> None:
        values = dict(zip(METERS, (self._sums() / self.summed).tolist(), strict=True))
        self.sums.zero_()
        self.summed = 0
        rate = steps * self.config.optimizer.batch_size / seconds
        entry = {
            "step": self.step,
            **values,
            "lr": learning_rate(self.config, self.step - 1),
            "broken_images": len(self._all_broken()),
            "images_per_second": round(rate, 1),
            "seconds": round(seconds, 2),
        }
        bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.0f} images/s")
        if self.accelerator.is_main_process:
            self.dir.append_log(entry)
        numbers = {key: value for key, value in entry.items() if key not in ("step", "seconds")}
        self.accelerator.log(numbers, step=self.step)

    def _sums(self) -> torch.Tensor:
        """The sums over all processes. Raises FloatingPointError if one is not finite: such weights are not saved."""
        sums: torch.Tensor = self.accelerator.reduce(self.sums, "mean")
        if not sums.isfinite().all():
            raise FloatingPointError(
                f"the loss is not finite at step {self.step}. What was saved before is as it was. Start anew under "
                "another --name with a lower --lr, a longer --warmup, a smaller --grad-clip or --mixed-precision no"
            )
        return sums

    def _save_grid(self) -> None:
        if not self.accelerator.is_main_process:
            return
        pipe = self._pipeline()
        count, classes = GRID_IMAGES, self.net.config.num_classes
        labels = [i % classes for i in range(count)] if classes else None
        pipe.set_progress_bar_config(disable=True)
        budget = max(self.config.run.sample_budget, pipe.plan(num_steps=1).planned)
        images = pipe(labels, count, budget=budget, seed=self.config.run.seed).images
        grid(images, columns=10).save(self.dir.samples / f"step-{self.step:08d}.png")

    def _save(self) -> None:
        state = {"sums": self._sums().tolist(), "summed": self.summed, "broken": self._all_broken()}
        if self.accelerator.is_main_process:
            optimizer = self.optimizer.optimizer
            keep = self.config.run.keep_checkpoints
            checkpoints.save(self.dir.checkpoints, self.step, self.net, self.ema.model, optimizer, state, keep)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        optimizer, say = self.optimizer.optimizer, self.accelerator.print
        state = checkpoints.load_newest(self.dir.checkpoints, self.net, self.ema.model, optimizer, say)
        if state is not None:
            self.step, self.summed, self.broken = state["step"], state["summed"], state["broken"]
            self.sums.copy_(torch.tensor(state["sums"]))
        if self.accelerator.is_main_process:
            self.dir.cut_log(self.step)

    def _export(self) -> None:
        """The averaged weights as a pipeline folder, with a note of what it was made from."""

        def write(folder: Path) -> None:
            self._pipeline().save_pretrained(folder)
            write_json(folder / TRAINING, {"step": self.step, **self.config.to_dict()})

        if self.accelerator.is_main_process:
            checkpoints.replace_folder(self.dir.pipeline, write)
        self.accelerator.wait_for_everyone()

    def _exported_step(self) -> int | None:
        note = self.dir.pipeline / TRAINING
        return read_json(note)["step"] if note.is_file() else None

    def _all_broken(self) -> list[str]:
        """The unreadable images that any process has met."""
        return sorted(set(gather_object(self.broken)))

    def _pipeline(self) -> FixedPointDiTPipeline:
        names = self.parts.source.class_names if self.net.config.num_classes else None
        return FixedPointDiTPipeline(cast(FixedPointDiT, self.ema.model), self.parts.schedule, class_names=names)

    @contextmanager
    def _tracker(self) -> Iterator[None]:
        self.accelerator.init_trackers("tensorboard")
        try:
            yield
        finally:
            self.accelerator.end_training()

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.config.optimizer.steps,
            initial=self.step,
            desc=self.dir.path.name,
            unit="step",
            disable=not self.accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            dynamic_ncols=True,
        )


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of the step after `step` are done: linear warm-up, then constant or half a cosine down to 0."""
    optimizer = config.optimizer
    if step < optimizer.warmup:
        return optimizer.lr * (step + 1) / optimizer.warmup
    if optimizer.lr_schedule == "constant":
        return optimizer.lr
    done = (step - optimizer.warmup) / max(1, optimizer.steps - optimizer.warmup)
    return optimizer.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_accelerator(config: Config, folder: Path) -> Accelerator:
    """accelerate's view of the devices. Raises ValueError for a device that is not there."""
    cpu = pick_device(config.run.device) == "cpu"
    tracker = None if config.run.tracker == "none" else config.run.tracker
    if tracker is not None:
        needs("tensorboard", "tensorboard")  # accelerate would go on without it, in silence
    precision = config.run.mixed_precision
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, log_with=tracker, project_dir=folder)
    if accelerator.distributed_type not in SUPPORTED:
        raise ValueError(f"{accelerator.distributed_type} is not supported: launch on one device, or with plain DDP")
    return accelerator


def check_space(folder: Path, model: Denoiser, checkpoints: int) -> None:
    """Raises OSError if the disk has no room for the checkpoints and the model. A checkpoint holds weights, average and
    AdamW's two moments in float32; one more than are kept is there for a moment."""
    needed = 4 * sum(p.numel() for p in model.parameters()) * (4 * (checkpoints + 1) + 2)
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            f"{there} has {free / 1e6:.0f} MB free; {checkpoints} checkpoints and the model need "
            f"{needed / 1e6:.0f} MB: make room, choose another --runs-dir, or keep fewer with --keep-checkpoints"
        )
