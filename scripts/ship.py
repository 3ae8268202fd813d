"""Put a trained model into the package: weights in float16, and a model card.

    python scripts/ship.py RUN --name fashion-mnist --result RESULT.json --model LABEL

RESULT.json is of `fpdm experiment`, and LABEL the model's in it: the card has its numbers, and the command that trained
it. The plans that `fpdm tune` kept with the run come along.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from fpdm.evaluation.result import significant
from fpdm.files import SHIPPED, model_folder, read_json
from fpdm.pipeline import FixedPointDiTPipeline

MOST_PARAMETERS, MOST_BYTES = 2_800_000, 6_000_000
DATA = {
    "fashion-mnist": "Fashion-MNIST (Zalando Research; MIT licence): the 60,000 training images, 28 x 28 pixels, grey",
}
CARD = """# {title}

A fixed point diffusion model: a diffusion transformer whose middle is one implicit layer, solved by fixed point
iteration, so that every sample may cost as much or as little as is asked.

- **Data**: {data}.
- **Licence** of the weights: Apache-2.0.
- **Network**: {blocks}, {width} wide, patches of {patch} pixels, {parameters:,} parameters, stored in float16
  ({size:.1f} MB).
- **Training**: `{command}`, {steps:,} steps of {batch} images, {hours:.1f} hours on {hardware}.
- **Use**: `fpdm sample {name} --budget 80 --out samples`, or
  `FixedPointDiTPipeline.from_pretrained("{name}")`. Classes: {classes}.

{distance} by block passes per image, {samples:,} samples against {real}, lower is better (real images have {floor}):

| passes | plan | {distance} |
| --- | --- | --- |
{rows}

It draws what it was trained on, small pictures of clothes, and is meant for trying the method and for tests. Guidance
was not used for these numbers.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run or pipeline folder")
    parser.add_argument("--name", required=True, choices=DATA)
    parser.add_argument("--result", required=True, type=Path, help="result.json of fpdm experiment")
    parser.add_argument("--model", required=True, help="label of the model in it")
    options = parser.parse_args()
    folder = SHIPPED / options.name
    pipe = FixedPointDiTPipeline.from_pretrained(model_folder(options.run))
    count = sum(weight.numel() for weight in pipe.transformer.parameters())
    if count > MOST_PARAMETERS:
        sys.exit(f"{options.run} has {count:,} parameters; at most {MOST_PARAMETERS:,} go into the package")
    pipe.to(torch.float16).save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        shutil.rmtree(folder)
        sys.exit(f"{folder} has {size:,} bytes; at most {MOST_BYTES:,} go into the package")
    (folder / "README.md").write_text(card(options.name, pipe, count, size, read_json(options.result), options.model))
    print(f"{folder}: {count:,} parameters, {size / 1e6:.2f} MB")
    return 0


def card(name: str, pipe: FixedPointDiTPipeline, count: int, size: int, result: dict[str, Any], label: str) -> str:
    sizes, training = pipe.transformer.config, next(t for t in result["trainings"] if t["model"] == label)
    points = [p for p in result["points"] if (p["model"], p["seed"], p["best"]) == (label, training["seed"], True)]
    distance, floor = next(iter(result["real"].items()))
    rows = []
    for point in sorted(points, key=lambda point: point["budget"]):
        value, low, high = point["measures"][distance]
        plan = f"{point['plan'].rsplit(', ', 1)[0]}, {point['scheduler']}"
        rows.append(
            f"| {point['budget']} | {plan} | {significant(value)} ({significant(low)} to {significant(high)}) |"
        )
    machine = result["made_with"]
    return CARD.format(
        title=f"{name}, a fixed point diffusion model",
        name=name,
        data=DATA[name],
        blocks=f"{sizes.num_pre} + {sizes.num_core} + {sizes.num_post} blocks, those in the middle iterated",
        width=sizes.hidden_size,
        patch=sizes.patch_size,
        parameters=count,
        size=size / 1e6,
        command=training["command"],
        steps=training["steps"],
        batch=training["batch_size"],
        hours=training["seconds"] / 3600,
        hardware=f"{machine['threads']} thread(s) of {machine['hardware']}",
        classes=", ".join(pipe.class_names) or str(sizes.num_classes),
        distance=distance,
        samples=points[0]["samples"],
        real=f"the {result['ground']['split']} images",
        floor=significant(floor),
        rows="\n".join(rows),
    )


if __name__ == "__main__":
    sys.exit(main())
