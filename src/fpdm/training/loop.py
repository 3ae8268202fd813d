"""The training loop.

A step is a function of (config, step number): what it trains on, adds, drops and iterates is keyed. So the state of a
run is its weights, their average, the optimiser's moments, what is known of the gradients' norms, and the sums that the
next line of the log will report.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fpdm.data import Batch, Slots, Source, Stream, begun, loader
from fpdm.machine import matrix_rate
from fpdm.training.build import Parts, build
from fpdm.training.clock import Clock, advice
from fpdm.training.config import Config
from fpdm.training.course import Course
from fpdm.training.devices import clip, gradients_shared, make_accelerator, shard
from fpdm.training.draws import Draws, Examples, draw
from fpdm.training.ema import Ema
from fpdm.training.guard import Diverged, Guard
from fpdm.training.halts import Halted, fetched, memory_needed
from fpdm.training.interrupt import Interrupt, deferred_interrupts
from fpdm.training.meters import Meters
from fpdm.training.rundir import PARTIAL, RunDir, check_apart, check_space
from fpdm.training.saving import Saver
from fpdm.training.schedule import learning_rate, notes
from fpdm.training.validation import Validation

METERS = ("loss", "mse", "vlb", "exit", "grad_norm")
STATUS_EVERY = 10  # steps between looks, over all processes, at whether one was asked to stop
MOST_ROLLBACKS = 3
LAST_MINUTE = 60.0  # seconds


class Trainer:
    """One run, from config to pipeline folder. `run()` trains until done or interrupted, and may be called on a folder
    in any state: new, stopped or finished."""

    def __init__(self, config: Config, path: str | Path, source: Source | None = None):
        """`source` stands in for the data that the config names."""
        self.config, self.started = config, time.monotonic()
        self.parts: Parts = build(config, source)
        check_apart(Path(path), config.data.data)
        self.kind = type(self.parts.model).__name__  # sharding changes its class
        self.accelerator = make_accelerator(config, Path(path))
        self._slots(0)  # refuses a batch that cannot be shared out
        self.dir = RunDir(path, config, self.parts.source.fingerprint)
        self.notes = notes(config, self.dir.step, self.dir.former_steps)
        check_space(self.dir.path, self.parts.model, config.run.keep_checkpoints)
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        if self.accelerator.is_main_process:
            self.dir.create()
        self.accelerator.wait_for_everyone()

        device, run = self.accelerator.device, config.run
        self.parts.loss.to(device)
        if self.parts.vae is not None:
            self.parts.vae.to(device)
        self.net = self.parts.model.to(device).train()
        self.ema = Ema(self.net, config.optimizer.ema)
        if run.compile:
            self.net.compile_repeated_blocks()
        if run.sharding == "fsdp":
            shard(self.net)
            shard(self.ema.model)
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(),
            lr=optimizer.lr,
            betas=(0.9, optimizer.beta2),
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.model = self.net if run.sharding == "fsdp" else self.accelerator.prepare(self.net)
        self.step = 0
        self.meters, self.guard = Meters(METERS, device), Guard(device, optimizer.skips)
        self.rollbacks = 0
        self.pace = Pace()
        self.operations = 0.0  # of this process's steps since the last line of the log
        self.broken: dict[str, None] = {}
        self.saver = Saver(self)

    def summary(self) -> str:
        """What is about to be trained on what, in two lines, and what may surprise in its learning rate."""
        source, optimizer, side = self.parts.source, self.config.optimizer, self.config.data.image_size
        parameters = sum(p.numel() for p in self.net.parameters())
        classes = self.net.config.num_classes
        held = f" and {len(self.parts.held):,} for validation" if self.parts.held else ""
        return (
            f"{self.kind}, {parameters / 1e6:.2f} M parameters, on {len(source):,} images of "
            f"{side} x {side} x {source.channels}, {f'{classes} classes' if classes else 'no classes'}{held}\n"
            f"{optimizer.steps:,} steps of {optimizer.batch_size} images on {self.accelerator.device}, "
            f"in {self.dir.path}" + "".join(f"\nnote: {note}" for note in self.notes)
        )

    def run(self) -> str:
        """Train. Returns "finished", "interrupted", or "already finished" if there was nothing to do.

        Raises FloatingPointError if training diverges (and rolling back is not asked for, or does not help), Halted, a
        ValueError, for data that cannot be read any more or a lack of memory, OSError for a disk that is full.
        """
        self.saver.restore()
        last = self.config.optimizer.steps
        if self.step >= last:
            if self.saver.exported_step() != self.step:
                self.saver.export()
            return "already finished"
        with deferred_interrupts() as interrupt, self._tracker(), self._bar() as bar:
            asked = self._train_or_keep(interrupt, bar)
            self._keep()
            self.broken = dict.fromkeys(self.saver.all_broken())  # while there are other processes to ask
        self.seconds = time.monotonic() - self.started
        return "interrupted" if asked and self.step < last else "finished"

    def _keep(self) -> None:
        """Save this step, where it is not saved yet, and the model."""
        if self.step % self.config.run.checkpoint_every:
            self.saver.save()
        self.saver.export()

    def _train_or_keep(self, interrupt: Interrupt, bar: tqdm) -> bool:
        """Train; where that cannot go on, keep what there is, and say so. Whether it was interrupted."""
        try:
            return self._train_on(interrupt, bar)
        except Halted as error:
            # To save takes all processes, and the others wait in a step for what this one cannot give them.
            if self.accelerator.num_processes > 1 or self.step == 0:
                raise
            self._keep()
            raise Halted(f"{error}. Step {self.step} is saved, and the next start goes on from there") from error

    def _train_on(self, interrupt: Interrupt, bar: tqdm) -> bool:
        """Train, after a divergence from the last checkpoint if that is asked for; whether it was interrupted."""
        while True:
            try:
                return self._train(interrupt, bar)
            except Diverged as error:
                count, sound = self.rollbacks + 1, self.saver.sound_steps()
                if self.config.run.on_divergence == "stop":
                    raise
                if count > MOST_ROLLBACKS or not sound:
                    tried = f"{MOST_ROLLBACKS} rollbacks did not help" if sound else "No checkpoint is from before"
                    raise FloatingPointError(error.advice(f"{tried}: start anew")) from error
                self.saver.restore(sound[-min(count, len(sound))])  # another time, the one before
                self.rollbacks, self.operations = count, 0.0
                self.saver.save()  # which removes the later ones: a start after a kill would go on from them
                what = f"{error.what}. Going back to step {self.step}, with {0.5**count:g} of the learning rate"
                self.accelerator.print(f"\n{what}")
                self.saver.append_log({"step": self.step, "rollback": count, "because": what})
                bar.n = self.step
                bar.refresh()

    def _train(self, interrupt: Interrupt, bar: tqdm) -> bool:
        """Steps until the last one or until asked to stop; whether it was asked."""
        run, clock = self.config.run, Clock(self.step)
        stream = Stream(
            self.parts.source, self.parts.prepare, batch_size=self.config.optimizer.batch_size, seed=run.seed
        )
        slots = self._slots(self.step)
        pin, workers = self.accelerator.device.type == "cuda", self.config.data.workers
        batches = fetched(begun(loader(stream, slots, workers, pin, self.parts.drawing)), slots.parts)
        for _ in slots.steps:
            with clock.waiting():
                some = next(batches)
            self._one_step(some)
            self.step += 1
            bar.update()
            if self.step % STATUS_EVERY == 0 or self.step % run.checkpoint_every == 0 or self.step == slots.steps.stop:
                self._check_divergence()
            if self.step % run.log_every == 0:
                self._log(bar, clock)
                self.meters.sums.zero_()
            elif self.step == slots.steps.stop:
                self._log(bar, clock, {PARTIAL: True})
            self.pace.stepped()
            if self.step % run.validate_every == 0:
                self._look()
            if self.step % run.checkpoint_every == 0:
                self.saver.save()
            if self.step % run.sample_every == 0:
                self.saver.save_grid()
            self.pace.paused()
            if self._asked_to_stop(interrupt):
                return True
        return False

    def _one_step(self, some: list[Examples]) -> None:
        rate = learning_rate(self.config, self.step) * 0.5**self.rollbacks
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with memory_needed(Halted):
            values = self._gradients(some)
        with memory_needed(ValueError):  # half an update may be made by then: it is not to be saved
            self._update(values)

    def _gradients(self, some: list[Examples]) -> dict[str, Tensor]:
        """The gradient of a step's parts, and the means of their losses."""
        # Drawn once per step and alike on all processes, so that all do the same work.
        course = self.parts.course(self.step)
        values: dict[str, Tensor] = {}
        for i, (batch, draws) in enumerate(some):
            assert batch.step == self.step, f"a batch of step {batch.step} came at step {self.step}"
            self.broken |= dict.fromkeys(batch.broken)
            with self._sharing(i == len(some) - 1):
                for name, value in self._backward(batch, draws, course).items():
                    values[name] = values.get(name, 0) + value / len(some)
            self.operations += self.parts.operations(course) * len(batch.slots)
        return values

    def _update(self, values: dict[str, Tensor]) -> None:
        """Weights, moments and average after a step, unless its gradient is of no use."""
        norm = clip(self.net.parameters(), self.config.optimizer.grad_clip)
        useless = self.guard.judge(norm, self.step)
        self.optimizer.found_inf = useless  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.meters.add({**values, "grad_norm": norm}, 1 - useless)
        self.ema.update(self.net, self.step + 1)

    def _backward(self, batch: Batch, draws: Draws, course: Course | None) -> dict[str, Tensor]:
        """The gradient of a micro-batch, and the means of its losses."""
        config, parts = self.config, self.parts
        whole = (batch.images, draws.noise, draws.timesteps, batch.labels, draws.dropped)
        x0, noise, t, labels, dropped = (value.to(self.accelerator.device, non_blocking=True) for value in whole)
        labels = parts.labels(labels, dropped)
        x_t = parts.loss.noisy(x0, noise, t)
        with self.accelerator.autocast():
            solving: dict[str, Any] = {}
            if course is not None:
                start = parts.start(self.model, course, draws, x_t, t, labels)
                solving = {"solve": course.solve, "init": start}
            output = self.model(x_t, t, labels, **solving)
        loss = parts.loss(output.sample.float(), x0, noise, t)
        total, found = loss.total.mean(), {"mse": loss.mse.mean(), "vlb": loss.vlb.mean()}
        teacher = output.sample if config.gradient.exit_loss == "final" else None
        for early in output.exits.values():
            extra = parts.loss(early.float(), x0, noise, t, teacher).total.mean()
            total, found["exit"] = total + config.gradient.exit_weight * extra, extra.detach()
        self.accelerator.backward(total / config.optimizer.accumulation)
        return {"loss": total.detach(), **found}

    def _sharing(self, now: bool) -> AbstractContextManager[Any]:
        """Whether the backward pass within shares its gradients with the other processes."""
        gradients_shared(self.net, now)
        return nullcontext() if now or self.model is self.net else self.accelerator.no_sync(self.model)

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
        limit, looks = self.config.run.time_limit, 1 if self.accelerator.num_processes == 1 else STATUS_EVERY
        late = limit is not None and time.monotonic() - self.started > limit * 60 - self.pace.reserve(looks)
        if self.accelerator.num_processes == 1:
            return interrupt.asked or late
        if self.step % STATUS_EVERY:
            return False
        flag = torch.tensor(float(interrupt.asked or late), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _check_divergence(self) -> None:
        """Raises Diverged after too many steps in a row whose gradient was of no use."""
        in_a_row, first = self.guard.run_of_bad_steps()
        if in_a_row >= self.config.optimizer.skips:
            timesteps = sorted(self._timesteps(first))
            raise Diverged(in_a_row, first, timesteps, self.dir.path)

    def _timesteps(self, step: int) -> list[int]:
        """The timesteps of a step's whole batch."""
        slots = list(range(self.config.optimizer.batch_size))
        return draw(self.config.run.seed, step, slots, (1,), self.parts.loss.num_timesteps, 0.0).timesteps.tolist()

    # --- what is told ----------------------------------------------------------------------------------------------

    def _log(self, bar: tqdm, clock: Clock, more: dict[str, Any] | None = None) -> None:
        """A line, of the steps since the last whole one."""
        sums: Tensor = self.accelerator.reduce(self.meters.sums, "mean")
        values = self.meters.means(sums)
        steps, seconds, waited = clock.lap(self.step)
        rate = steps * self.config.optimizer.batch_size / seconds
        entry = {
            "step": self.step,
            **values,
            "lr": self.optimizer.param_groups[0]["lr"],
            "skipped_steps": self.guard.skipped(),
            "broken_images": len(self.saver.all_broken()),
            "images_per_second": round(rate, 1),
            "steps_per_second": round(steps / seconds, 3),
            "share_of_matrix_rate": round(self.operations / seconds / self._matrix_rate, 3),
            "share_waiting_for_data": round(waited / seconds, 3),
            "seconds": round(clock.total, 2),
            **(more or {}),
        }
        self.operations = 0.0
        if "loss" in values:
            waiting = advice(waited / seconds, self.config.data.workers)
            bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.0f} images/s{waiting}")
        self.saver.append_log(entry)

    @cached_property
    def _matrix_rate(self) -> float:
        """Operations per second of this device's own matrix product, of the network's width."""
        dtype = torch.bfloat16 if self.config.run.mixed_precision == "bf16" else torch.float32
        tokens = (self.net.config.sample_size // self.net.config.patch_size) ** 2
        return matrix_rate(self.accelerator.device, dtype, tokens * self._slots(0).size, self.net.config.hidden_size)

    @cached_property
    def _validation(self) -> Validation:
        parts = self.parts
        return Validation(parts.source, parts.held, parts.prepare, parts.loss, self.config.run.seed, parts.typical)

    def _look(self) -> None:
        model = self.saver.averaged()
        if model is not None and self.accelerator.is_main_process:
            look = self._validation.look(model, self._slots(0).size, self.accelerator.device)
            self.broken |= dict.fromkeys(self._validation.broken)
            if look.buckets or look.residuals:
                self.saver.append_log({"step": self.step, "validation": look.to_dict()})
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _tracker(self) -> Iterator[None]:
        project = "fpdm" if self.config.run.tracker == "wandb" else "tensorboard"
        kept = {"wandb": {"dir": str(self.dir.path), "name": self.dir.path.name}}
        self.accelerator.init_trackers(project, init_kwargs=kept)
        try:
            yield
        finally:
            with self.saver.writing("what the tracker held back"):
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


class Pace:
    """How long steps and the pauses between them take, by which a run stops in time."""

    def __init__(self) -> None:
        self.step, self.pause, self.last = 0.0, 0.0, time.monotonic()

    def stepped(self) -> None:
        seconds = self._since()
        self.step = seconds if not self.step else self.step + 0.1 * (seconds - self.step)

    def paused(self) -> None:
        self.pause = max(self.pause, self._since())

    def _since(self) -> float:
        before, self.last = self.last, time.monotonic()
        return self.last - before

    def reserve(self, steps: int) -> float:
        """Seconds before a time limit at which to stop: a minute, so many steps until the next look at the clock, and
        twice the longest pause so far, to save and to export."""
        return LAST_MINUTE + steps * self.step + 2 * self.pause
