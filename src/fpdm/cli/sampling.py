"""The part of `fpdm sample` that needs torch: loading, and drawing what is missing."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from fpdm.imaging import grid
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.sampling import Report
from fpdm.training.rundir import write_aside

GRID_IMAGES = 100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(folder: str, device: str, dtype: str) -> FixedPointDiTPipeline:
    """The pipeline in a folder, on its device. Raises ValueError for damaged files or a device that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there.get(device, False):
        raise ValueError(f"device {device!r} is not available here; those that are: {[d for d in there if there[d]]}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        pipe = FixedPointDiTPipeline.from_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the model in {folder} cannot be opened, copy it again: {error}") from error
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
    pipe.check_inputs(plan, pipe.labels(labels, 1), choices["scheduler"], choices["guidance_scale"])
    request = {"model": digest(pipe.transformer), "classes": classes, **choices}
    _claim(out, request)
    print(f"{plan} per image")

    reports = out / "report.json"
    report = Report.from_dict(json.loads(reports.read_text())["report"]) if reports.is_file() else None
    missing = [i for i in range(count) if not _file(out, i).is_file()]
    for start in range(0, len(missing), batch_size):
        indices = missing[start : start + batch_size]
        pipe.set_progress_bar_config(desc=f"images {len(missing) - start} to go", unit="step", leave=False)
        batch = None if labels is None else [labels[i] for i in indices]
        result = pipe(batch, len(indices) if batch is None else 1, image_indices=indices, **choices)
        for i, image in zip(indices, result.images, strict=True):
            _save_aside(image, _file(out, i))
        report = result.report if report is None else report.merged(result.report)
        write_aside(reports, json.dumps({"request": request, "report": report.to_dict()}, indent=1) + "\n")
    shown = [Image.open(_file(out, i)) for i in range(min(count, GRID_IMAGES))]
    _save_aside(grid(shown, columns=min(10, len(classes or [])) or 10), out / "grid.png")
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


def _save_aside(image: Image.Image, path: Path) -> None:
    aside = path.with_name(f".{path.name}.writing")
    image.save(aside, format="PNG")
    aside.replace(path)


def _claim(out: Path, request: dict[str, Any]) -> None:
    """Make `out` the folder of this request, or find that it is already."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "request.json"
    text = json.dumps(request, indent=1) + "\n"
    if path.is_file():
        old = json.loads(path.read_text())
        changed = [
            f"{key} was {old.get(key)!r}, is {value!r}" for key, value in request.items() if old.get(key) != value
        ]
        if changed:
            raise ValueError(f"{out} holds images of another request: {'; '.join(changed)}. Choose another --out")
    elif any(out.glob("*.png")):
        raise ValueError(f"{out} holds images already: choose another --out")
    write_aside(path, text)
