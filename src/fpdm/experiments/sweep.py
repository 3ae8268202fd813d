"""Quality against compute: models x budgets x schedulers, each point drawn, measured, and kept in a file of its own.

    OUT/sweep.json            what all points share
    OUT/points/KEY.json       a finished point
    OUT/grids/KEY.png         its first images
    OUT/drawing/KEY/          the images of an unfinished one; drawn on when the sweep goes on
    OUT/report.html           plots and a table of all finished points

A point is computed by one process from the start to the end and depends on nothing but its request, so that it is the
same however many processes there are, and wherever a sweep was stopped.
"""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from tqdm import tqdm

from fpdm.devices import pick_device
from fpdm.drawing import channels_of, check_precision, draw_missing, load_pipeline, placed, side_of
from fpdm.evaluation import Evaluation, Instrument, open_samples
from fpdm.experiments.points import Axes, Point, Settings, points_of
from fpdm.files import cache_folder, hold, is_free, read_json, write_json
from fpdm.machine import made_with, threads_each
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.signals import handled_by
from fpdm.weights import digest

# What may differ between the parts of one sweep: how it is computed, but not what.
CHANGEABLE = {"device", "statistics", "batch_size", "data"}

# What older versions had all points of a sweep share, and what it must have been for such points to be added to.
FORMERLY_SHARED = {"seed": 0, "reuse": True, "allocation": "constant"}


def run_sweep(
    models: list[str],
    axes: Axes,
    settings: Settings,
    out: Path,
    processes: int = 1,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Compute what is missing of a sweep; all its finished points. The report is the caller's to write.

    models  folders, each as PATH or LABEL=PATH

    Raises ValueError, before anything is computed, for models, budgets or settings that cannot be, or if `out` holds a
    sweep of other settings or other models of the same names.
    """
    points, left_out = points_of(models, axes, settings)
    for reason in left_out:
        say(f"left out: {reason}")
    return run_points(points, settings, out, processes, say)


def run_points(
    points: list[Point], settings: Settings, out: Path, processes: int = 1, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Compute those of the points that `out` lacks; all that it holds. Raises ValueError as `run_sweep` does."""
    check_precision(settings.dtype)
    device_for(settings)
    size, channels = shape_of(points)
    check_claim(out, settings, points)
    instrument = instrument_for(settings, size, channels)
    out.mkdir(parents=True, exist_ok=True)
    with hold(out):
        claim(out, settings, points, instrument.reference.identity)
        compute_missing(points, settings, out, processes, say)
    return all_points(out)


def compute_missing(
    points: list[Point], settings: Settings, out: Path, processes: int, say: Callable[[str], None]
) -> None:
    """Compute those of the points that `out` lacks."""
    missing = [point for point in points if not finished(out, point.key)]
    for point in set(points) - set(missing):
        shutil.rmtree(out / "drawing" / point.key, ignore_errors=True)
    if len(missing) < len(points):
        say(f"{len(points) - len(missing)} of {len(points)} points are there")
    work = {point: point.operations * settings.num_images for point in missing}
    with tqdm(
        total=sum(work.values()), desc="sweep", bar_format="{desc} {percentage:.0f}% [{elapsed}<{remaining}]"
    ) as bar:
        for point, result in computed(missing, settings, out, processes, bar.update):
            write_json(out / "points" / f"{point.key}.json", result)
            shutil.rmtree(out / "drawing" / point.key, ignore_errors=True)
            first = Evaluation.from_dict(result["evaluation"]).measures[0]
            bar.write(f"{point.key:32} {first.name} {first.value:.3g} ({first.low:.3g} to {first.high:.3g})")


def shape_of(points: list[Point]) -> tuple[int, int]:
    """Side and channels of all models' images. Raises ValueError if they differ."""
    folders = {point.label: point.folder for point in points}
    sizes, channels = {}, {}
    for label, folder in folders.items():
        pipe = load_pipeline(folder, "cpu", "float32")  # one at a time: together they may not fit
        sizes[label], channels[label] = side_of(pipe), channels_of(pipe)
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the models draw images of different sizes, which one sweep cannot compare: {sizes}")
    if len(set(channels.values())) > 1:
        raise ValueError(f"the models draw grey and coloured images, which one sweep cannot compare: {channels}")
    return next(iter(sizes.values())), next(iter(channels.values()))


def check_claim(out: Path, settings: Settings, points: list[Point]) -> dict[str, Any]:
    """What `out` says of the sweep that it holds. Raises ValueError if that is another, or none."""
    path = out / "sweep.json"
    new: dict[str, Any] = {"settings": {}, "models": {}, "identity": None}
    if not path.is_file():
        if not is_free(out):
            raise ValueError(f"{out} is there already and holds no sweep: choose another --out")
        return new
    old = read_json(path)
    if not isinstance(old, dict) or set(old) != set(new):
        raise ValueError(f"{path} is not of a sweep: choose another --out")
    changed = [
        f"{name} was {old['settings'].get(name)!r}, is {value!r}"
        for name, value in asdict(settings).items()
        if name not in CHANGEABLE and old["settings"].get(name) != value
    ]
    digests = {point.label: point.digest for point in points}
    for name, default in FORMERLY_SHARED.items():
        if (value := old["settings"].get(name, default)) != default:
            changed.append(f"all its points have {name} {value!r}, as older versions had it")
    changed += [f"{label} had other weights" for label, now in digests.items() if old["models"].get(label, now) != now]
    if changed:
        raise ValueError(f"{out} holds another sweep: {'; '.join(changed)}. Choose another --out")
    return old


def claim(out: Path, settings: Settings, points: list[Point], identity: dict[str, Any]) -> None:
    """Make `out` the folder of this sweep, whose points are measured against statistics of this identity."""
    old = check_claim(out, settings, points)
    if old["identity"] not in (None, identity):
        raise ValueError(f"{out} was measured against other data or by another network: choose another --out")
    models = {**old["models"], **{point.label: point.digest for point in points}}
    write_json(out / "sweep.json", {"settings": asdict(settings), "models": models, "identity": identity})
    for folder in ("points", "grids", "drawing"):
        (out / folder).mkdir(exist_ok=True)


def finished(out: Path, key: str) -> bool:
    """Whether a point is kept, whole."""
    try:
        read_json(out / "points" / f"{key}.json")
    except (OSError, ValueError):
        return False
    return (out / "grids" / f"{key}.png").is_file()


def all_points(out: Path) -> list[dict[str, Any]]:
    """All finished points in a folder, by model, scheduler and budget."""
    keys = sorted(path.stem for path in (out / "points").glob("*.json"))
    found = [{**read_json(out / "points" / f"{key}.json"), "key": key} for key in keys if finished(out, key)]
    return sorted(found, key=lambda p: (p["model"], p["scheduler"], p["budget"], p["key"]))


def computed(
    points: list[Point], settings: Settings, out: Path, processes: int, on_work: Callable[[float], Any]
) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Points and their results, as they are done."""
    if processes == 1:
        for point in points:
            yield point, measure_point(point, settings, out, 1, lambda n, point=point: on_work(n * point.operations))  # type: ignore[misc]
        return
    threads = threads_each(processes)
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    counter = context.Value("i", 0)
    with ProcessPoolExecutor(processes, context, start_worker, (threads, counter)) as pool:
        with handled_by(signal.SIG_IGN, signal.SIGINT):  # by the processes, too: the main one ends them
            futures = {pool.submit(measure_point, point, settings, out, processes): point for point in points}
        try:
            for future in as_completed(futures):
                point = futures[future]
                yield point, future.result()
                on_work(point.operations * settings.num_images)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "one of the processes died, killed perhaps for want of memory: the same command goes on, with fewer "
                "--processes if need be"
            ) from error
        except BaseException:
            workers = list((pool._processes or {}).values())  # shutdown forgets them
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.kill()  # what is drawn is on the disk
            raise


_place = 0  # which of the worker processes this is


def start_worker(threads: int, counter: Any) -> None:
    from diffusers.utils import logging

    global _place
    with counter.get_lock():
        _place = counter.value
        counter.value += 1
    Thread(target=end_with_the_main_process, daemon=True).start()
    torch.set_num_threads(threads)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()


def end_with_the_main_process() -> None:
    """A killed main process must not leave others drawing into folders that the next sweep will use."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def measure_point(
    point: Point,
    settings: Settings,
    out: Path,
    processes: int,
    on_batch: Callable[[int], Any] = lambda images: None,
) -> dict[str, Any]:
    """Draw and measure one point: what is kept of it."""
    pipe = pipeline_for(point.folder, point.digest, device_for(settings), settings.dtype)
    drawing, choices = out / "drawing" / point.key, point.choices
    classes = list(range(pipe.transformer.config.num_classes)) or None
    report = draw_missing(pipe, drawing, settings.num_images, classes, settings.batch_size, choices, on_batch)
    samples = open_samples(drawing, settings.num_images)
    evaluation = instrument_for(settings, samples.size, channels_of(pipe)).measure(samples, progress=False)
    shutil.copyfile(drawing / "grid.png", out / "grids" / f"{point.key}.png")
    return {
        "model": point.label,
        "budget": point.budget,
        "scheduler": choices.scheduler,
        "iterations": None if point.tuned else choices.iterations,
        "allocation": choices.allocation,
        "reuse": choices.reuse,
        "solver": choices.solver,
        "seed": choices.seed,
        "tuned": point.tuned,
        "plan": str(choices.plan(pipe)),
        "passes": report.spent,
        "operations": point.operations,
        "parameters": point.parameters,
        "seconds": report.seconds / report.images,
        "diverged": report.diverged,
        "evaluation": evaluation.to_dict(),
        "request": read_json(drawing / "request.json"),
        "made_with": {**made_with(str(pipe.device)), "batch_size": settings.batch_size, "processes": processes},
    }


def device_for(settings: Settings) -> str:
    device = pick_device(settings.device)
    return f"cuda:{_place % torch.cuda.device_count()}" if device == "cuda" else device


@lru_cache(maxsize=8)  # points go from model to model
def pipeline_for(folder: str, weights: str, device: str, dtype: str) -> FixedPointDiTPipeline:
    """Raises ValueError if the weights in the folder are not those whose digest is `weights`."""
    pipe = load_pipeline(folder, "cpu", "float32")
    if digest(pipe.transformer) != weights:
        raise ValueError(f"the model in {folder} has changed since the sweep began: give it another name, LABEL=PATH")
    return placed(pipe, device, dtype)


@lru_cache(maxsize=1)
def instrument_for(settings: Settings, size: int, channels: int) -> Instrument:
    """What images of this size are measured with: the statistics of the real ones are then there for all processes.
    Raises ValueError for data that cannot be opened, or are not for such images."""
    return Instrument.open(
        settings.data,
        size,
        channels=channels,
        split=settings.split,
        features=settings.features,
        weights=settings.weights,
        statistics=settings.statistics,
        cache=cache_folder(),
        device=device_for(settings),
    )
