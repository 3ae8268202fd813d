"""What a training step holds in memory: how exact the estimate is, and what DiT and FPDM need.

    python benchmarks/memory.py --out FOLDER     writes FOLDER/memory.json and FOLDER/memory.png

The same command goes on where it was stopped.

Compared: the estimate (`fpdm.training.memory`) with the peak of a real training step, the second of a `Trainer`, each
in a process of its own. On the CPU the peak is the running sum of every allocation and release that torch's allocator
reports to torch.profiler, over what weights, moments and average hold: exact, which the size of the process is not (it
grows by what the system's allocator does not give back, and by the libraries); that is kept beside it. With CUDA the
peak is torch.cuda.max_memory_allocated, and the sizes of the table are measured too, as far as they fit.

Counted: DiT and FPDM (N = 10, M = 12) at 32x32x4, 1000 classes, with and without gradient checkpointing, in float32 and
under bf16 autocast as CUDA casts.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fpdm.data import Batch
from fpdm.files import read_json, write_aside, write_json
from fpdm.fixedpoint import Solve
from fpdm.machine import made_with
from fpdm.training.config import Config
from fpdm.training.course import Course
from fpdm.training.memory import network, solves, stand_in, training_memory

LATENTS = {"source": "latents", "data": "none", "channels": 4, "image_size": 32, "classes": 1000, "batch_size": 32}
SMALL = {**LATENTS, "model": "S/2", "image_size": 16, "classes": 10, "batch_size": 16}
PAIRS: list[dict[str, Any]] = [
    {},
    {"checkpointing": True},
    {"mixed_precision": "bf16"},
    {"mixed_precision": "bf16", "checkpointing": True},
    {"accumulation": 2},
    {"model": "B/4", "image_size": 32},
]
OF_FPDM: list[dict[str, Any]] = [
    {"num_core": 2},
    {"exit_loss": "target"},
    {"gradient": "phantom"},
    {"gradient": "unroll", "checkpointing": True},
    {"gradient": "jfb"},
    {"gradient": "implicit"},
]
SIZES, BATCHES = ("S/2", "B/2", "XL/2"), (8, 32, 128)
EXPLICIT = {"network": "dit"}


@dataclass(frozen=True)
class Case:
    """Fields of a config, and which solve of a step of it: see `solves`."""

    fields: dict[str, Any]
    draw: str

    @property
    def config(self) -> Config:
        return Config().with_fields(**self.fields)

    @property
    def solve(self) -> Solve | None:
        config = self.config
        return solves(config, network(config, stand_in(config.data)))[self.draw]


def cases(*changes: dict[str, Any]) -> list[Case]:
    fields = {name: value for change in changes for name, value in change.items()}
    config = Config().with_fields(**fields)
    return [Case(fields, draw) for draw in solves(config, network(config, stand_in(config.data)))]


def compared() -> list[Case]:
    """Of draws the largest."""
    both = [cases(SMALL, kind, pair)[-1] for pair in PAIRS for kind in (EXPLICIT, {})]
    return both + [cases(SMALL, pair)[-1] for pair in OF_FPDM]


def counted() -> list[Case]:
    ways = [{"mixed_precision": p, "checkpointing": c} for p in ("no", "bf16") for c in (False, True)]
    sizes = [{"model": size, "batch_size": 32} for size in SIZES]
    sizes += [{"model": "XL/2", "batch_size": batch} for batch in BATCHES if batch != 32]
    return [
        case for size in sizes for kind in (EXPLICIT, {}) for way in ways for case in cases(LATENTS, size, kind, way)
    ]


def row(case: Case) -> dict[str, Any]:
    config = case.config
    memory = training_memory(config, stand_in(config.data), case.solve)
    shown = {name: value for name, value in case.fields.items() if LATENTS.get(name) != value}
    return {**shown, "batch_size": case.fields["batch_size"], "draw": case.draw, **asdict(memory)}


# --- measuring, in a process of its own


def measure(case: Case, device: str) -> dict[str, float]:
    from fpdm.training.dry import RandomLatents
    from fpdm.training.loop import Trainer

    def size() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    config, solve = case.config.with_fields(device=device, keep_checkpoints=1), case.solve
    images, before = config.optimizer.batch_size, size()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder) / "run", RandomLatents(config, images))
        if case.draw != "every":  # else the method has no counts to draw, and is what is measured
            fixed = SimpleNamespace(of=lambda *_: Course(solve))
            trainer.parts = replace(trainer.parts, courses=fixed)

        def step() -> None:
            part = images // config.optimizer.accumulation
            shape = (part, config.data.channels, config.data.image_size, config.data.image_size)
            firsts = range(0, images, part)
            parts = (
                Batch(trainer.step, list(range(i, i + part)), torch.zeros(shape), torch.zeros(part).long(), [], None)
                for i in firsts
            )
            trainer._one_step([trainer.parts.drawing.of(batch) for batch in parts])
            trainer.step += 1

        step()  # which makes the optimiser's moments
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            return {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        grown = size() - before
        networks = (trainer.net, trainer.ema.model)
        held = [tensor for model in networks for tensor in (*model.parameters(), *model.buffers())]
        held += [value for state in trainer.optimizer.state.values() for value in state.values()]
        return {"peak": sum(tensor.nbytes for tensor in held) + allocated(step), "process": grown}


def allocated(function: Callable[[], None]) -> int:
    """The most bytes that the CPU's allocator has given out at a time while `function` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = [e for e in read_json(Path(folder) / "trace.json")["traceEvents"] if e.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


def measured(case: Case, device: str) -> dict[str, Any]:
    """What `measure` finds in a new process; None where it does not fit."""
    words = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--device", device]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode and "OutOfMemoryError" not in done.stderr:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    return {"measured": None} if done.returncode else {"measured": json.loads(done.stdout.splitlines()[-1])}


def fill(path: Path, result: dict[str, Any], name: str, some: list[Case], device: str, real: bool) -> None:
    """Add the rows of `some` that `result[name]` lacks, each written as it is there."""
    for case in some:
        shown = {**case.fields, "draw": case.draw}
        if label(shown) in map(label, result[name]):
            continue
        found = {**row(case), **(measured(case, device) if real else {})}
        result[name].append(found)
        write_json(path, result)
        tell(found)


# --- telling


def label(found: dict[str, Any]) -> str:
    """Another one for each case."""
    names = ("network", "model", "num_core", "gradient", "exit_loss", "mixed_precision", "accumulation", "draw")
    numbers = {"num_core": "K = ", "accumulation": "accumulation "}
    words = [f"{numbers.get(name, '')}{found[name]}" for name in names if found.get(name) not in (None, "no", "every")]
    return " ".join([*words, f"x {found['batch_size']}", *(["checkpointing"] if found.get("checkpointing") else [])])


def tell(found: dict[str, Any]) -> None:
    real = found.get("measured")
    ratio = f", measured {real['peak'] / 1e6:.1f}, ratio {found['peak'] / real['peak']:.3f}" if real else ""
    print(f"{label(found)}: {found['peak'] / 1e6:.1f} MB{ratio}", flush=True)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ways = {
        "DiT": {"network": "dit", "checkpointing": False},
        "DiT, checkpointing": {"network": "dit", "checkpointing": True},
        "FPDM, most": {"draw": "most", "checkpointing": False},
        "FPDM, mean": {"draw": "mean", "checkpointing": False},
        "FPDM, checkpointing": {"draw": "most", "checkpointing": True},
    }
    parts = {"weights, moments, average": ("parameters", "optimizer", "ema"), "activations": ("activations",)}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axis, precision in zip(axes, ("no", "bf16"), strict=True):
        for place, way in enumerate(ways.values()):
            wanted = {"model": "XL/2", "batch_size": 32, "mixed_precision": precision, **way}
            (found,) = (row for row in result["counted"] if all(row.get(key) == wanted[key] for key in wanted))
            bottom = 0.0
            for number, names in enumerate(parts.values()):
                height = sum(found[name] for name in names) / 1e9
                axis.bar(place, height, bottom=bottom, color=f"C{number}")
                bottom += height
            axis.bar(place, found["peak"] / 1e9 - bottom, bottom=bottom, color="C2")
            axis.annotate(f"{found['peak'] / 1e9:.1f}", (place, found["peak"] / 1e9), ha="center", va="bottom")
        axis.set_xticks(range(len(ways)), [name.replace(", ", ",\n") for name in ways], fontsize=8)
        axis.set_title("float32" if precision == "no" else "bf16 autocast")
        axis.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("GB at the peak of a training step")
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{number}") for number in range(3)]
    axes[1].legend(handles, [*parts, "gradients, in work"], fontsize=8)
    figure.suptitle("XL/2, batch 32, 32x32x4")
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(Case(**options.case), options.device)))
        sys.exit()
    if options.out is None:
        parser.error("--out FOLDER is needed")
    options.out.mkdir(parents=True, exist_ok=True)
    path, cuda = options.out / "memory.json", options.device == "cuda"
    empty: dict[str, Any] = {"made_with": made_with(options.device), "compared": [], "counted": []}
    result = read_json(path) if path.is_file() else empty
    fill(path, result, "compared", compared(), options.device, True)
    fill(path, result, "counted", counted(), options.device, cuda)
    write_aside(options.out / "memory.png", lambda aside: plot(result, aside))
