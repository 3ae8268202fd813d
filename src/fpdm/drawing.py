"""Many images of one request into one folder: numbered PNGs, a grid, request.json, report.json. What is there already
is not drawn again, so an interruption costs one batch."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from fpdm.data import write_npz
from fpdm.devices import Processes, check_compiler, pick_device
from fpdm.files import hold, read_json, write_aside, write_json
from fpdm.imaging import grid
from fpdm.models import to_float8, to_int8
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.sampling import Plan, Report, check_reuse
from fpdm.sampling.schedulers import KINDS
from fpdm.weights import digest

GRID_IMAGES = 100
REPORT, PART = "report.json", ".report-"
# Of a scheduler's configuration, what is read whatever draws, and what is where its own kind does.
OF_SCHEDULES = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
                "rescale_betas_zero_snr", "clip_sample", "clip_sample_range")  # fmt: skip
OF_SOLVERS = ("solver_order", "solver_type", "algorithm_type", "disable_corrector")
ALONE = Processes()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IN_8_BITS: dict[str, Callable[[Any], Any]] = {"int8": to_int8, "float8": to_float8}


@dataclass(frozen=True)
class Choices:
    """How images are drawn: the keyword arguments of the pipeline's call, and a seed."""

    budget: int | None = None
    num_inference_steps: int | None = None
    iterations: int | Sequence[int] | None = None
    allocation: str = "constant"
    reuse: str = "plain"
    solver: str = "picard"
    tolerance: float | None = None
    pooled: bool = False
    scheduler: str | None = None
    guidance_scale: float = 1.0
    guidance_interval: Sequence[float] | None = None
    guidance_channels: int | None = None
    guidance_share: float = 1.0
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def plan(self, pipe: FixedPointDiTPipeline) -> Plan:
        """Raises ValueError if the choices contradict each other, or the pipeline has no such thing."""
        return pipe.plan(**self.to_dict())


def load_pipeline(
    folder: str, device: str, dtype: str, *, compiled: bool = False, graphs: bool = False
) -> FixedPointDiTPipeline:
    """The pipeline in a folder, placed on its device; `compiled` compiles its blocks at the first call, and `graphs`
    records its calls as CUDA graphs.

    Raises ValueError for damaged files, a device or compiler that is not there, or a dtype that is none or not for it.
    """
    device = pick_device(device)
    check_precision(dtype)
    if compiled:
        check_compiler(device)
    if graphs and not device.startswith("cuda"):
        raise ValueError(f"--cuda-graphs are for a GPU, not for {device}: leave them out, or ask for --device cuda")
    try:
        pipe = FixedPointDiTPipeline.from_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the model {folder} cannot be opened: {error}") from error
    pipe = placed(pipe, device, dtype)
    if compiled:
        pipe.transformer.compile_repeated_blocks()
    if graphs:
        pipe.transformer.enable_cuda_graphs()
    return pipe


def placed(pipe: FixedPointDiTPipeline, device: str, dtype: str) -> FixedPointDiTPipeline:
    """A pipeline, just opened, on a device, its weights in a dtype; "int8" and "float8" are of the blocks of its
    network alone, the rest being float32, and with float8 on a GPU bfloat16.

    Raises ValueError if the device cannot multiply in 8 bits.
    """
    if dtype not in IN_8_BITS:
        return pipe.to(device, dtype_of(dtype))
    pipe.to(device, torch.bfloat16 if dtype == "float8" and device.startswith("cuda") else torch.float32)
    IN_8_BITS[dtype](pipe.transformer)
    return pipe


def check_precision(name: str) -> None:
    """Raises ValueError for a name that no network can be drawn with."""
    if name not in IN_8_BITS and name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join([*DTYPES, *IN_8_BITS])}")


def dtype_of(name: str) -> torch.dtype:
    """Raises ValueError for a name that is none of those of weights."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def side_of(pipe: FixedPointDiTPipeline) -> int:
    """The side of the pipeline's images in pixels."""
    doublings = 0 if pipe.vae is None else len(pipe.vae.config.block_out_channels) - 1
    return pipe.transformer.config.sample_size * 2**doublings


def schedule_of(pipe: FixedPointDiTPipeline) -> dict[str, Any]:
    """What the pipeline's scheduler is, and how it is configured."""
    settings = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return {"kind": type(pipe.scheduler).__name__, **settings}


def channels_of(pipe: FixedPointDiTPipeline) -> int:
    """The channels of the pipeline's images."""
    return pipe.transformer.config.in_channels if pipe.vae is None else pipe.vae.config.out_channels


def draw_missing(
    pipe: FixedPointDiTPipeline,
    out: Path,
    count: int,
    classes: list[Any] | None,
    batch_size: int,
    choices: Choices,
    on_batch: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> Report:
    """Draw those of images 0 to count - 1 that `out` lacks; the report covers all that were ever drawn into it.

    classes    numbers or names, of the images in turn; None draws without classes
    on_batch   called with the number of images of each batch that was drawn, instead of showing a bar of its own
    processes  share the images out; each calls this with the same arguments

    Raises ValueError, before anything is drawn, if `out` holds images of another request.
    """
    numbers = pipe.labels(classes, None)
    classes = None if numbers is None else numbers.tolist()
    labels = cycled(classes, count)
    pipe.request(labels, count, **choices.to_dict())  # which refuses what cannot be
    request = {
        "model": digest(pipe.transformer),
        "vae": None if pipe.vae is None else digest(pipe.vae),
        "noise_schedule": schedule_of(pipe),
        "classes": classes,
        "class_names": pipe.class_names,
        **choices.to_dict(),
    }
    with ExitStack() as stack:

        def begin() -> None:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(out))
            _claim(out, request)
            _collect(out)

        processes.first(begin)
        _draw(pipe, out, count, labels, batch_size, choices, on_batch, processes)
        processes.wait()
        if processes.main:
            _collect(out)
            there = max({count - 1} | _drawn(out / REPORT)[0]) + 1  # earlier calls may have asked for more
            files = [image_file(out, i) for i in range(min(there, GRID_IMAGES))]
            shown = [Image.open(path) if path.is_file() else None for path in files]
            columns = min(10, len(classes or [])) or 10
            write_aside(out / "grid.png", partial(grid(shown, columns).save, format="PNG"))
        processes.wait()
    report = _drawn(out / REPORT)[1]
    assert report is not None
    return report


def _read_by_sampling(request: dict[str, Any]) -> dict[str, Any]:
    """A request with the name of the scheduler that draws, and of the pipeline's no more than is read of it."""
    full = request["noise_schedule"]
    own = next((name for name, kind in KINDS.items() if kind.__name__ == full["kind"]), "")
    name = request["scheduler"] or own
    settings = full if name == own else KINDS[name]().config
    read = {key: full[key] for key in OF_SCHEDULES if full.get(key)}
    read |= {key: settings[key] for key in OF_SOLVERS if settings.get(key)}
    if "clip_sample" in read:
        read = {"clip_sample_range": 1.0, **read}
    return {**request, "scheduler": name, "noise_schedule": read}


def _differences(key: str, old: Any, new: Any) -> Iterator[str]:
    """What differs between two values of a request, in words."""
    if old == new:
        return
    if key in ("model", "vae") and old and new:  # digests
        yield f"{key} had other weights, or another --dtype"
    elif key == "vae":
        yield f"there was {'an' if old else 'no'} autoencoder"
    elif isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(f"{key}: {name}", old.get(name), new.get(name))
    else:
        yield f"{key} was {old!r}, is {new!r}"


def _draw(
    pipe: FixedPointDiTPipeline,
    out: Path,
    count: int,
    labels: list[int] | None,
    batch_size: int,
    choices: Choices,
    on_batch: Callable[[int], None] | None,
    processes: Processes,
) -> None:
    """Draw this process's share of what is missing of the request that `out` holds."""
    done, whole = _drawn(out / REPORT)
    missing = [i for i in range(count) if i not in done or not image_file(out, i).is_file()]
    missing = missing[processes.index :: processes.count]
    lost = [i for i in missing if i in done]  # their files: they are in the report already, and drawn by themselves
    new = [i for i in missing if i not in done]
    # The main process goes on with the report; the others begin one each, which is collected at the end.
    path = out / (REPORT if processes.main else f"{PART}{processes.index}.json")
    drawn, report = (done, whole) if processes.main else (set(), None)
    processes.wait()  # until all have read it
    batches = [part[i : i + batch_size] for part in (new, lost) for i in range(0, len(part), batch_size)]
    left, steps = len(missing), choices.plan(pipe).num_steps
    for indices in batches:
        pipe.set_progress_bar_config(
            desc=f"images {left} to go", unit="step", leave=False, disable=on_batch is not None or not processes.main
        )
        batch = None if labels is None else [labels[i] for i in indices]
        result = pipe(batch, len(indices), image_indices=indices, **choices.to_dict())
        if len(result.report.timesteps) < steps:
            raise InterruptedError(f"the pipeline was interrupted: images {indices[0]} to {indices[-1]} are not drawn")
        for i, image in zip(indices, result.images, strict=True):
            write_aside(image_file(out, i), partial(image.save, format="PNG"))
        left -= len(indices)
        if not done.issuperset(indices):
            report = result.report if report is None else report.merged(result.report)
            drawn |= set(indices)
            kept = {"request": read_json(out / "request.json"), "images": sorted(drawn), "report": report.to_dict()}
            write_json(path, kept)
        if on_batch is not None:
            on_batch(len(indices))


def _collect(out: Path) -> None:
    """Take the reports that processes left into the one of the folder."""
    for part in sorted(out.glob(f"{PART}*.json")):
        drawn, report = _drawn(out / REPORT)
        images, found = _drawn(part)
        if found is not None and not drawn.issuperset(images):  # else it was taken, and this process stopped just then
            report = found if report is None else report.merged(found)
            kept = {"request": read_json(out / "request.json"), "images": sorted(drawn | images)}
            write_json(out / REPORT, {**kept, "report": report.to_dict()})
        part.unlink()


def cycled(classes: list[Any] | None, count: int) -> list[Any] | None:
    """The class of each of `count` images."""
    return None if classes is None else [classes[i % len(classes)] for i in range(count)]


def write_archive(out: Path, count: int, classes: list[int] | None) -> Path:
    """Images 0 to count - 1 of the folder as samples.npz in the ADM layout: `arr_0` (N, H, W, 3) uint8, grey images
    with three equal channels, and `arr_1` (N,) their labels."""
    path, labels = out / "samples.npz", cycled(classes, count)
    images = (np.asarray(Image.open(image_file(out, i)).convert("RGB")) for i in range(count))
    write_aside(path, lambda aside: write_npz(aside, images, count, None if labels is None else np.array(labels)))
    return path


def image_file(out: Path, index: int) -> Path:
    """Where image `index` of a folder of samples is."""
    return out / f"{index:06d}.png"


def _drawn(path: Path) -> tuple[set[int], Report | None]:
    """The images that a report covers, and the report. Others are drawn, or drawn again."""
    if not path.is_file():
        return set(), None
    kept = read_json(path)
    try:
        return set(kept["images"]), Report.from_dict(kept["report"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of another version: {error}. Choose another --out") from error


def _claim(out: Path, request: dict[str, Any]) -> None:
    """Make `out` the folder of this request, or find that it is already."""
    path = out / "request.json"
    if path.is_file():
        old, known = read_json(path), Choices().to_dict()  # a request of an older version lacks what is new
        old["reuse"] = check_reuse(old.get("reuse", known["reuse"]))  # and says yes or no
        new = json.loads(json.dumps(request))
        old, new = (_read_by_sampling({**new, **known, **values}) for values in (old, new))
        changed = [text for key, value in new.items() for text in _differences(key, old[key], value)]
        if changed:
            raise ValueError(f"{out} holds images of another request: {'; '.join(changed)}. Choose another --out")
    elif any(out.glob("*.png")):
        raise ValueError(f"{out} holds images already: choose another --out")
    write_json(path, request)
