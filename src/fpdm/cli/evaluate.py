"""Measure how good samples are: Frechet and kernel distance, precision, recall, accuracy, nearest real images.

  fpdm evaluate samples --data digits                    a folder of images, or an .npz file in the ADM layout
  fpdm evaluate runs/digits --data digits --num-images 1000 --budget 160 --out evaluation
                                                         draws the samples first, what is missing of them

Each number comes with a 95% interval, and with the same number for real images against other real images: the floor.
With --out, evaluation-NETWORK.json and nearest-NETWORK.png (the samples nearest to a real image, above it) are written
there.
"""

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpdm.cli.quiet import quiet_libraries
from fpdm.cli.sample import add_drawing_arguments, check_counts, draw
from fpdm.files import cache_folder, check_writable, is_inside, model_folder, read_json, write_json

if TYPE_CHECKING:
    from fpdm.evaluation import Evaluation, Instrument

MODEL_FILES = ("model_index.json", "pipeline", "checkpoints")
LEAST = 50  # samples to draw of a model
NUM_IMAGES = 1000  # where the options say nothing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_SAMPLES", help="a model, a folder of images, or an .npz file")
    parser.add_argument("--out", metavar="DIR", help="folder for the result, and for the samples of a model")
    add_measuring_arguments(parser).add_argument(
        "--copies-of", metavar="DATA", help="images that samples may be copies of: those trained on (the real images)"
    )
    add_drawing_arguments(parser, NUM_IMAGES)


def add_measuring_arguments(parser: argparse.ArgumentParser) -> Any:
    """What samples are measured against, and how: a group of options."""
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--data", required=True, metavar="DATA",
                           help="real images: a folder of them, IDX files, .npz file, hub:NAME, or digits")  # fmt: skip
    measuring.add_argument("--split", default="train", metavar="SPLIT",
                           help="of IDX files, or of a data set of Hugging Face's (train)")  # fmt: skip
    measuring.add_argument("--features", metavar="{classifier,efficientnet-lite0,inception,dinov2}",
                           help="network to see by (classifier for tiny grey images, else the second)")  # fmt: skip
    measuring.add_argument("--weights", metavar="FILE", help="of that network (default: its own)")
    measuring.add_argument("--statistics", metavar="FILE",
                           help="of the real images, made if it is not there (default: one in the cache)")  # fmt: skip
    return measuring


def run(options: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "several processes were launched, and one measures: have them draw with `fpdm sample`, then evaluate that"
        )
    out = None if options.out is None else Path(options.out)
    if out is not None:
        check_writable(out)
        for real in real_images(options):
            refuse_inside(out, real)
    result = evaluate_samples(options, out) if is_samples(options.model) else evaluate_model(options, out)
    evaluation = result["evaluation"]
    print(evaluation)
    if out is not None:
        path = result_in(out, result["features"])
        if other := compared_otherwise(kept_in(path).get("evaluation", {}), evaluation):
            print(f"{path} {other}, and is replaced")
        write_json(path, {**result, "evaluation": evaluation.to_dict()})
        print(f"written: {path}, {picture_in(out, result['features'])}")
    return 0


def compared_otherwise(before: dict[str, Any], evaluation: "Evaluation") -> str | None:
    """What an evaluation that is there was compared with, where that was something else."""
    if not before:
        return None
    if before.get("identity") != evaluation.identity:
        return f"was against {before.get('real', {}).get('name')}"
    if before.get("originals") != evaluation.originals:
        return f"has copies of {(before.get('originals') or before.get('real', {})).get('name')}"
    return None


def real_images(options: argparse.Namespace) -> list[str]:
    """All that samples are looked at beside."""
    return [place for place in (options.data, options.copies_of) if place is not None]


def refuse_inside(out: Path, data: str) -> None:
    """Raises ValueError for results in the folder of the real images."""
    if is_inside(out, Path(data)):
        raise ValueError(
            f"{out} is in the folder of the real images, {data}, which it would join: choose another --out"
        )


def refuse_other(out: Path, network: str, samples: str) -> None:
    """Raises ValueError if `out` has an evaluation of samples of another name: a model's are those in `out` itself."""
    path = result_in(out, network)
    found = kept_in(path)
    if found and (others := found.get("samples", out.name)) != samples:
        raise ValueError(f"{path} is there, and of the samples {others}: choose another --out")


def kept_in(path: Path) -> dict[str, Any]:
    """The result in a file; empty without one that can be read."""
    with suppress(OSError, ValueError):
        if isinstance(found := read_json(path), dict):
            return found
    return {}


def result_in(out: Path, network: str) -> Path:
    return out / f"evaluation-{network}.json"


def picture_in(out: Path, network: str) -> Path:
    return out / f"nearest-{network}.png"


def is_samples(place: str) -> bool:
    """Whether a place holds samples; else it is to be a model."""
    path = Path(place)
    return path.is_file() or (path.is_dir() and not any((path / name).exists() for name in MODEL_FILES))


def evaluate_samples(options: argparse.Namespace, out: Path | None) -> dict[str, Any]:
    path = Path(options.model)
    refuse_drawing(options)
    drawn = (path / "request.json").is_file()  # of whose pictures only the numbered ones are samples
    if out is not None and not drawn and is_inside(out, path):
        raise ValueError(f"{out} is in the folder of the samples, which its pictures would join: choose another --out")
    for real in map(Path, real_images(options)):
        if path.is_dir() and path.resolve() != real.resolve() and is_inside(path, real):
            raise ValueError(
                f"{path} is in the folder of the real images, {real}, and counted as some of them: move it elsewhere"
            )
    quiet_libraries()
    from fpdm.evaluation import open_samples
    from fpdm.machine import made_with

    samples = open_samples(path)
    instrument = open_instrument(options, samples.size, samples.channels, samples.coloured)
    if out is not None:
        refuse_other(out, instrument.extractor.name, path.name)
        out.mkdir(parents=True, exist_ok=True)
    result = instrument.measure(samples, None if out is None else picture_in(out, instrument.extractor.name))
    return {
        "evaluation": result,
        "features": instrument.extractor.name,
        "samples": path.name,
        "made_with": made_with(instrument.extractor.device),
    }


def evaluate_model(options: argparse.Namespace, out: Path | None) -> dict[str, Any]:
    """Draw what is missing, then measure. What cannot be measured is refused before anything is drawn."""
    check_counts(options, LEAST)
    folder = model_folder(options.model)
    if out is None:
        raise ValueError("to evaluate a model, name a folder for its samples with --out")
    quiet_libraries()
    from fpdm.drawing import channels_of, load_pipeline, side_of
    from fpdm.evaluation import open_samples
    from fpdm.machine import made_with

    pipe = load_pipeline(folder, options.device, options.dtype)
    size, channels = side_of(pipe), channels_of(pipe)
    del pipe  # which `draw` loads again: two might not fit
    instrument = open_instrument(options, size, channels)
    refuse_other(out, instrument.extractor.name, out.name)
    report = draw(options)
    samples = open_samples(out, options.num_images)
    result = instrument.measure(samples, picture_in(out, instrument.extractor.name))
    return {
        "evaluation": result,
        "features": instrument.extractor.name,
        "request": read_json(out / "request.json"),
        "report": report.to_dict(),
        "made_with": made_with(instrument.extractor.device),
    }


def open_instrument(options: argparse.Namespace, size: int, channels: int, coloured: int | None = None) -> "Instrument":
    from fpdm.devices import pick_device
    from fpdm.evaluation import Instrument

    return Instrument.open(
        options.data,
        size,
        channels=channels,
        coloured=coloured,
        split=options.split,
        features=options.features,
        weights=options.weights,
        statistics=options.statistics,
        copies_of=options.copies_of,
        cache=cache_folder(),
        device=pick_device(options.device),
    )


def refuse_drawing(options: argparse.Namespace) -> None:
    """Raises ValueError for options of drawing where there are samples already."""
    drawing = argparse.ArgumentParser(add_help=False)
    add_drawing_arguments(drawing, NUM_IMAGES)
    for name, default in vars(drawing.parse_args([])).items():
        if name != "device" and getattr(options, name) != default:  # which measures them, too
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{options.model} holds samples, which are measured as they are: leave {flag} out")
