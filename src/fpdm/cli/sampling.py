"""The part of `fpdm sample` that needs torch: loading, and drawing what is missing."""

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from fpdm.devices import pick_device
from fpdm.files import read_json, write_aside, write_json
from fpdm.imaging import grid
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.sampling import Report

GRID_IMAGES = 100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(folder: str, device: str, dtype: str) -> FixedPointDiTPipeline:
    """The pipeline in a folder, on its device. Raises ValueError for damaged files or a device that is not there."""
    device = pick_device(device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        pipe = FixedPointDiTPipeline.from_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the model {folder} cannot be opened: {error}") from error
    return pipe.to(device, DTYPES[dtype])


def draw_missing(
    pipe: FixedPointDiTPipeline,
    out: Path,
    count: int,
    classes: list[Any] | None,
    batch_size: int,
    choices: dict[str, Any],
) -> Report:
    """Draw those of images 0 to count - 1 that `out` lacks; the report covers all that were ever drawn into it.

    Raises ValueError, before anything is drawn, if `out` holds images of another request.
    """
    labels = None if classes is None else [classes[i % len(classes)] for i in range(count)]
    plan = pipe.plan(
        budget=choices["budget"],
        num_steps=choices["num_inference_steps"],
        iterations=choices["iterations"],
        allocation=choices["allocation"],
    )
    pipe.check_inputs(plan, pipe.labels(labels, None), choices["scheduler"], choices["guidance_scale"])
    request = {"model": digest(pipe.transformer), "classes": classes, **choices}
    _claim(out, request)
    print(f"{plan} per image")

    drawn, report = _drawn(out)
    missing = [i for i in range(count) if i not in drawn or not _file(out, i).is_file()]
    for start in range(0, len(missing), batch_size):
        indices = missing[start : start + batch_size]
        pipe.set_progress_bar_config(desc=f"images {len(missing) - start} to go", unit="step", leave=False)
        batch = None if labels is None else [labels[i] for i in indices]
        result = pipe(batch, len(indices), image_indices=indices, **choices)
        for i, image in zip(indices, result.images, strict=True):
            write_aside(_file(out, i), partial(image.save, format="PNG"))
        if new := set(indices) - drawn:  # an image drawn again, because its file was lost, counts once
            part = replace(result.report, images=len(new))
            report, drawn = part if report is None else report.merged(part), drawn | new
            write_json(out / "report.json", {"request": request, "images": sorted(drawn), "report": report.to_dict()})
    shown = [Image.open(_file(out, i)) for i in range(min(count, GRID_IMAGES))]
    write_aside(out / "grid.png", partial(grid(shown, columns=min(10, len(classes or [])) or 10).save, format="PNG"))
    assert report is not None
    return report


def digest(model: torch.nn.Module) -> str:
    """The SHA-256 of a network's weights: a model that moved is the same, one that was trained on is another."""
    sha = hashlib.sha256()
    for name, weight in model.state_dict().items():
        sha.update(name.encode())
        sha.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


def _file(out: Path, index: int) -> Path:
    return out / f"{index:06d}.png"


def _drawn(out: Path) -> tuple[set[int], Report | None]:
    """The images that the report in `out` covers, and the report. Others are drawn, or drawn again."""
    path = out / "report.json"
    if not path.is_file():
        return set(), None
    kept = read_json(path)
    return set(kept["images"]), Report.from_dict(kept["report"])


def _claim(out: Path, request: dict[str, Any]) -> None:
    """Make `out` the folder of this request, or find that it is already."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "request.json"
    if path.is_file():
        old = read_json(path)
        changed = [
            f"{key} was {old.get(key)!r}, is {value!r}" for key, value in request.items() if old.get(key) != value
        ]
        if changed:
            raise ValueError(f"{out} holds images of another request: {'; '.join(changed)}. Choose another --out")
    elif any(out.glob("*.png")):
        raise ValueError(f"{out} holds images already: choose another --out")
    write_json(path, request)
