"""Put a trained model into the package: its weights in float16, measured as they are stored, and a model card.

    fpdm tune RUN --data DIR --budget 24,40,80,160 --out TUNED
    python scripts/ship.py RUN --name fashion-mnist --data DIR --out SWEEP

The tuned plans come along, and are what is measured. SWEEP is a folder of `fpdm sweep`, for docs and plots; the same
command goes on with one that was interrupted.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from fpdm.evaluation import Evaluation
from fpdm.evaluation.result import significant
from fpdm.experiments.experiment import REPORTING
from fpdm.experiments.points import Axes, Settings
from fpdm.experiments.sweep import all_points, run_sweep
from fpdm.experiments.table import Training
from fpdm.files import SHIPPED, model_folder, read_json
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.recipes import recipe
from fpdm.training.config import Config, differences

MOST_PARAMETERS, MOST_BYTES = 2_800_000, 6_000_000
SAMPLES, SPLIT = 5000, "test"
RECIPE = {"fashion-mnist": "fashion_mnist"}
DATA = {
    "fashion-mnist": "Fashion-MNIST (Zalando Research; MIT licence): the 60,000 training images, 28 x 28 pixels, grey",
}
CLASSES = {
    "fashion-mnist": [
        "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
    ],
}  # fmt: skip
CARD = """# {title}

A fixed point diffusion model: a diffusion transformer whose middle is one implicit layer, solved by fixed point
iteration, so that every sample may cost as much or as little as is asked.

- **Data**: {data}.
- **Licence** of the weights: Apache-2.0.
- **Network**: {blocks}, {width} wide, patches of {patch} pixels, {parameters:,} parameters, stored in float16
  ({size:.1f} MB).
- **Training**: `{command}`, {steps:,} steps of {batch} images.
- **Use**: `fpdm sample {name} --budget 80 --out samples`, or
  `FixedPointDiTPipeline.from_pretrained("{name}")(class_labels=0, budget=80).images`. Classes: {classes}.

{distance} by block passes per image, {samples:,} samples against the {split} images, lower is better (real images have
{real}). Measured as stored, without guidance, with the tuned plans, which commands take by themselves:

| passes | plan | {distance} |
| --- | --- | --- |
{rows}

It draws what it was trained on, small pictures of clothes, and is meant for trying the method and for tests.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True, choices=DATA)
    parser.add_argument("--data", required=True, help="what it was trained on")
    parser.add_argument("--out", required=True, type=Path, help="folder of the sweep")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    folder = SHIPPED / options.name
    store(options.run, folder)
    measure(folder, options.data, options.out, options.processes)
    (folder / "README.md").write_text(card(options.name, folder, options.run, options.out))
    print(f"{folder}: {size_of(folder) / 1e6:.2f} MB")
    return 0


def store(run: Path, folder: Path) -> None:
    """Store the model of a run in half precision, if it is small enough."""
    pipe = FixedPointDiTPipeline.from_pretrained(model_folder(str(run)))
    if (count := parameters_of(pipe)) > MOST_PARAMETERS:
        sys.exit(f"{run} has {count:,} parameters; at most {MOST_PARAMETERS:,} go into the package")
    if not unguided_budgets(pipe):
        sys.exit(f"{run} has no tuned plans: `fpdm tune {run}` makes them")
    shutil.rmtree(folder, ignore_errors=True)
    named = FixedPointDiTPipeline(
        pipe.transformer.half(),
        pipe.scheduler,
        class_names=CLASSES[folder.name],
        only_classes=pipe.config.only_classes,
    )
    named.tuned_plans = pipe.tuned_plans
    named.save_pretrained(folder)
    if (size := size_of(folder)) > MOST_BYTES:
        shutil.rmtree(folder)
        sys.exit(f"{folder} has {size:,} bytes; at most {MOST_BYTES:,} go into the package")


def measure(folder: Path, data: str, out: Path, processes: int) -> None:
    """Draw from what is stored with each tuned plan."""
    budgets = unguided_budgets(FixedPointDiTPipeline.from_pretrained(folder))
    axes = Axes(budgets, (), seeds=(REPORTING,), tuned=True)
    run_sweep([f"{folder.name}={folder}"], axes, Settings(data, split=SPLIT, num_images=SAMPLES), out, processes)


def card(name: str, folder: Path, run: Path, sweep: Path) -> str:
    """The model card, from what is stored, the run's config, and the sweep."""
    pipe = FixedPointDiTPipeline.from_pretrained(folder)
    sizes, config = pipe.transformer.config, Config.from_dict(read_json(run / "config.json"))
    changed = differences(recipe(RECIPE[name]).to_dict(), config.to_dict())
    changes = {"steps": config.optimizer.steps, **{field: now for field, (_, now) in changed.items()}}
    training = Training(name, config.run.seed, RECIPE[name], changes)
    points = sorted(all_points(sweep), key=lambda point: point["budget"])
    first = Evaluation.from_dict(points[0]["evaluation"])
    return CARD.format(
        title=f"{name}, a fixed point diffusion model",
        name=name,
        data=DATA[name],
        blocks=f"{sizes.num_pre} + {sizes.num_core} + {sizes.num_post} blocks, those in the middle iterated",
        width=sizes.hidden_size,
        patch=sizes.patch_size,
        parameters=parameters_of(pipe),
        size=size_of(folder) / 1e6,
        command=f"fpdm train {' '.join(training.words)} --data DIR",
        steps=config.optimizer.steps,
        batch=config.optimizer.batch_size,
        classes=", ".join(pipe.class_names) or str(sizes.num_classes),
        distance=first.measures[0].name,
        samples=first.samples,
        split=SPLIT,
        real=first.measures[0].real,
        rows="\n".join(map(row, points)),
    )


def row(point: dict[str, Any]) -> str:
    measure = Evaluation.from_dict(point["evaluation"]).measures[0]
    plan = f"{point['plan'].rsplit(', ', 1)[0]}, {point['scheduler']}"
    return (
        f"| {point['budget']} | {plan} | {significant(measure.value)} ({significant(measure.low)} to "
        f"{significant(measure.high)}) |"
    )


def unguided_budgets(pipe: FixedPointDiTPipeline) -> list[int]:
    """Of its tuned plans."""
    return sorted(plan.budget for plan in pipe.tuned_plans if plan.guidance_scale == 1)


def parameters_of(pipe: FixedPointDiTPipeline) -> int:
    return sum(weight.numel() for weight in pipe.transformer.parameters())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
