"""A run that everything happens to, against one that nothing does: both must end with the same weights and log.

    python scripts/soak.py --out FOLDER [--steps 50000] [--kills 40] [--seed 0]     an hour on two cores

Both train on the digits as an image folder, one file of which is broken. The disturbed one is killed (SIGKILL) at
random moments until its steps are done, so many times at least, once in the middle of writing a checkpoint; finds its
newest checkpoint damaged; and meets a full disk, a small one that is mounted for it (tmpfs, for which one must be root)
or else a limit on the size of its files. After each of these the same command is given again. FOLDER/soak.json tells
the story; the exit status is 0 if the two runs are equal.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fpdm.data import digits
from fpdm.files import write_json
from fpdm.machine import made_with

TIMES = {"seconds", "images_per_second", "steps_per_second", "share_of_matrix_rate"}
DISK = 24 * 2**20  # bytes: three checkpoints of the run and the model fit, a filler of the rest does not
EVERY = 100  # steps between checkpoints


class Story:
    """What happened, told as it happens and kept."""

    def __init__(self, path: Path):
        self.path, self.began, self.events = path, time.monotonic(), list[dict[str, Any]]()

    def tell(self, what: str, **more: Any) -> None:
        minutes = round((time.monotonic() - self.began) / 60, 2)
        self.events.append({"minute": minutes, "event": what, **more})
        print(f"{minutes:6.2f} min  {what}  {more or ''}", flush=True)


class Run:
    """A training that is started again and again by one command."""

    def __init__(self, folder: Path, data: Path, steps: int):
        self.folder, self.steps = folder / "run", steps
        self.log, self.checkpoints = self.folder / "log.jsonl", self.folder / "checkpoints"
        settings = {
            "--data": data, "--channels": 1, "--image-size": 8, "--hidden-size": 64, "--num-heads": 4,
            "--patch-size": 2, "--no-flip": None, "--no-grad-max": 4, "--with-grad-max": 4, "--exit-loss": "final",
            "--warm-share": 0.5, "--steps": steps, "--batch-size": 32, "--workers": 0, "--device": "cpu",
            "--checkpoint-every": EVERY, "--log-every": 20, "--sample-every": 10 * EVERY,
            "--validate-every": 2 * EVERY, "--holdout": 100, "--keep-checkpoints": 2, "--name": "run",
            "--runs-dir": folder,
        }  # fmt: skip
        words = [str(word) for pair in settings.items() for word in pair if word is not None]
        self.command = [sys.executable, "-m", "fpdm", "train", "images", *words, "--model", "S/2"]

    def start(self, limit: int | None = None, output: Any = subprocess.PIPE) -> subprocess.Popen:
        """`limit` bytes are the most that a file of the process may have."""

        def limited() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            self.command, stdout=output, stderr=subprocess.STDOUT, text=True, preexec_fn=limited,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def steps_done(self) -> int:
        found = [int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")]
        return max(found, default=0)

    def newest(self) -> Path:
        return self.checkpoints / f"step-{self.steps_done():08d}"


def make_data(folder: Path) -> None:
    """The digits as files, one of which is no image."""
    source = digits()
    for index in range(len(source)):
        image, label = source.load(index)
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (folder / "3" / "0003.png").write_bytes(b"\x89PNG, but not for long")


def disturb(run: Run, story: Story, kills: int, chance: random.Random, small: Path | None) -> None:
    """Carry `run` to its end through everything. `small` is the disk that it is on, if that is a small one."""
    writing, damaging, filling = (chance.randrange(3, max(4, kills // 2)) for _ in range(3))  # while it trains
    for kill in count():
        if kill >= kills and run.steps_done() >= run.steps:
            break
        process = run.start()
        seconds = chance.uniform(5, 100)
        if kill == writing:
            torn = wait_until(lambda: any(run.checkpoints.glob(".*.writing")), 300)
            process.kill()
            story.tell("killed while it wrote a checkpoint" if torn else "killed", step=run.steps_done())
        else:
            wait_until(lambda p=process: p.poll() is not None, seconds)
            process.kill()
            story.tell("killed", after=round(seconds, 1), step=run.steps_done())
        process.communicate()
        if kill == damaging:
            damage(run, story, chance)
        if kill == filling:
            fill(run, story, small)
    for _ in range(3):
        process = run.start()
        said, _ = process.communicate()
        story.tell(f"ended with status {process.returncode}", said=said.strip().splitlines()[-3:])
        if process.returncode == 0:
            return


def damage(run: Run, story: Story, chance: random.Random) -> None:
    """Change a byte in the middle of the newest checkpoint."""
    while not run.steps_done():
        process = run.start()
        wait_until(run.steps_done, 600)
        process.kill()
        process.communicate()
    path = run.newest() / chance.choice(["weights.safetensors", "ema.safetensors", "optimizer.safetensors"])
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    process = run.start()
    step = run.steps_done()
    wait_until(lambda: process.poll() is not None or run.steps_done() > step, 240)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    named = [line for line in said.splitlines() if "is damaged" in line]
    story.tell("a checkpoint was damaged", file=f"{path.parent.name}/{path.name}", named=named, step=run.steps_done())


def fill(run: Run, story: Story, small: Path | None) -> None:
    """Have the disk full: what the command says, and that the checkpoints are still there."""
    before = run.steps_done()
    lines = run.log.stat().st_size if run.log.is_file() else 0
    process = run.start(None if small is not None else 64 * 2**10)
    if small is not None:
        training = lambda: run.log.is_file() and run.log.stat().st_size > lines + 200  # noqa: E731
        wait_until(lambda: process.poll() is not None or training(), 600)
        filler = small / "filler"
        filler.write_bytes(b"\0" * max(0, shutil.disk_usage(small).free - 64 * 2**10))
    said, _ = process.communicate(timeout=900)
    story.tell(f"the disk was full: status {process.returncode}", said=said.strip().splitlines()[-1:],
               before=before, after=run.steps_done())  # fmt: skip
    if small is not None:
        filler.unlink()


def wait_until(done: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():
            return True
        time.sleep(0.002)
    return False


def differences(one: Run, other: Run, steps: int) -> list[str]:
    """What differs between two runs that are finished."""
    found = []
    for name in ("weights", "ema", "optimizer"):
        a, b = (load_file(run.checkpoints / f"step-{steps:08d}" / f"{name}.safetensors") for run in (one, other))
        found += [f"{name}: {key}" for key in a.keys() | b.keys() if key not in a or key not in b
                  or not torch.equal(a[key], b[key])]  # fmt: skip
    logs = [[{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in run.log.read_text().splitlines()]
            for run in (one, other)]  # fmt: skip
    return found + (["log"] if logs[0] != logs[1] else [])


def mounted(folder: Path) -> bool:
    """Whether a small disk could be mounted at `folder`."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    return subprocess.run(["mount", *options], capture_output=True).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"{options.out} is there already: choose another --out")
    options.out.mkdir(parents=True)
    story, chance = Story(options.out / "soak.json"), random.Random(options.seed)
    make_data(options.out / "data")

    calm = Run(options.out / "calm", options.out / "data", options.steps)
    undisturbed = calm.start(output=(options.out / "calm.out").open("w"))  # a pipe would fill, and stop it
    small = options.out / "small"
    disk = small if mounted(small) else None
    story.tell("begun", small_disk=bool(disk), steps=options.steps, kills=options.kills)
    try:
        wild = Run(small, options.out / "data", options.steps)
        disturb(wild, story, options.kills, chance, disk)
        undisturbed.wait()
        story.tell(f"the undisturbed run ended with status {undisturbed.returncode}")
        wrong = differences(calm, wild, options.steps)
        story.tell("the two runs are equal" if not wrong else "the two runs differ", differences=wrong)
        shutil.copy(wild.log, options.out / "log.jsonl")
    finally:
        undisturbed.kill()
        if disk is not None:
            subprocess.run(["umount", "-l", str(small)], check=False)
    events = json.loads(json.dumps(story.events).replace(str(options.out), "FOLDER"))
    write_json(story.path, {"made_with": made_with("cpu"), "equal": not wrong, "events": events})
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
