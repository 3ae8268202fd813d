"""Train a model by a recipe, or go on with a run that was stopped.

  fpdm train digits                                     no data needed, a few minutes on two cores
  fpdm train fashion_mnist --data DIR                   the four IDX files
  fpdm train images --data DIR --image-size 64 --model S/4
                                                        any folder of images, one folder per class or none
  fpdm train images --data DIR --form 0+4+0             all blocks shared

  fpdm train imagenet256 --dry-run                      before the data is there: sizes, and one step in miniature

The run is kept in runs/NAME: config, log, sample grids, checkpoints, and at the end the model. Ctrl-C saves and stops;
the same command goes on.
"""

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from fpdm.cli.processes import leave
from fpdm.cli.quiet import quiet_libraries
from fpdm.files import check_writable
from fpdm.recipes import RECIPES, recipe
from fpdm.recipes.forms import form
from fpdm.training.adopt import fields_of
from fpdm.training.config import Config, groups, is_optional, value_type


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--form", metavar="A+K+B", help="explicit, shared and explicit blocks, with the training that "
                        "suits them, e.g. 1+1+1 or 0+4+0 (the recipe's); single fields below override it")  # fmt: skip
    parser.add_argument("--name", help="name of the run (default: the recipe's)")
    parser.add_argument("--dry-run", action="store_true", help="without the data: print sizes, try one narrow step")
    parser.add_argument("--runs-dir", default="runs", help="folder of all runs (default: runs)")
    for group, cls in groups().items():
        section = parser.add_argument_group(f"{group} (defaults are the recipe's)")
        for f in fields(cls):
            flag, kind = "--" + f.name.replace("_", "-"), value_type(cls, f.name)
            more: dict[str, Any] = {"dest": f"field_{f.name}", "help": f.metadata["help"], "default": argparse.SUPPRESS}
            if kind is bool:
                section.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
            else:
                choices = f.metadata.get("choices")
                metavar = "{" + ",".join(map(str, choices)) + "}" if choices else kind.__name__.upper()
                section.add_argument(
                    flag, type=reader(kind) if is_optional(cls, f.name) else kind, metavar=metavar, **more
                )


def run(options: argparse.Namespace) -> int:
    config = resolve(options)
    if options.dry_run:
        return dry(options, config)
    path = Path(options.runs_dir) / (options.name or options.recipe.replace("-", "_"))
    check_writable(path)

    quiet_libraries()
    from fpdm.training.loop import Trainer

    trainer = Trainer(config, path)
    main_process = trainer.accelerator.is_main_process
    if main_process:
        print(trainer.summary(), flush=True)
    outcome = trainer.run()
    if main_process:
        saved = trainer.saver.is_saved()
        print(closing_words(outcome, trainer.step, saved, path, list(trainer.broken), config))
    status = 130 if outcome == "interrupted" else 0
    if trainer.accelerator.num_processes > 1:
        leave(status)
    return status


def dry(options: argparse.Namespace, config: Config) -> int:
    """Print what `fpdm info` does, and take one step at a reduced width on random data."""
    from fpdm.cli import info

    info.run(options)
    from fpdm.training.dry import dry_run

    small, seconds = dry_run(config)
    shape = f"{config.data.image_size} x {config.data.image_size} x {config.data.channels}"
    print(f"\none step of {small.optimizer.batch_size} random inputs of {shape}, the network {small.model.hidden_size} "
          f"wide: done, saved and exported in {seconds:.1f} s")  # fmt: skip
    return 0


def resolve(options: argparse.Namespace) -> Config:
    """The config: the recipe's, then a form's fields or what a model to fine-tune dictates, then what the command line
    says."""
    given = {name.removeprefix("field_"): value for name, value in vars(options).items() if name.startswith("field_")}
    formed = formed_by(recipe(options.recipe), options.form, given)
    adopted = fields_of(given["init_from"]) if given.get("init_from") else {}
    for name, value in adopted.items():
        if name in given and given[name] != value:
            folder = given["init_from"]
            raise ValueError(f"{name} is {value} in {folder}, not {given[name]}: leave it or --init-from out")
    return formed.with_fields(**{**adopted, **given})


def formed_by(config: Config, name: str | None, given: dict[str, Any]) -> Config:
    """Raises ValueError where there can be no such form, or none at all."""
    if name is None:
        return config
    if given.get("init_from"):
        raise ValueError(f"the model in {given['init_from']} has its form: leave --form or --init-from out")
    if given.get("network") == "dit":
        raise ValueError("an explicit network has --depth, and no --form")
    return config.with_fields(**form(name))


def reader(kind: type) -> Callable[[str], Any]:
    """Reads a value of `kind` from the command line; the word "none" is None, which optional fields take."""

    def read(text: str) -> Any:
        return None if text == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it in its messages
    return read


def closing_words(outcome: str, step: int, saved: bool, path: Path, broken: list[str], config: Config) -> str:
    lines = []
    if broken:
        shown = "\n  ".join(broken[:10]) + (f"\n  and {len(broken) - 10} more" if len(broken) > 10 else "")
        lines.append(f"{len(broken)} images could not be read and were passed over:\n  {shown}")
    if outcome == "interrupted":
        there = f"Saved at step {step}" if saved else f"Stopped at step {step}, which could not be saved"
        lines.append(f"{there}. The same command goes on from {'there' if saved else 'what was saved before'}.")
    elif outcome == "already finished":
        more = "Take another --name"
        if config.optimizer.lr_schedule != "cosine":  # which has come down to 0, and would jump up again
            more = "Ask for more with --steps, or take another --name"
        lines.append(f"{path} is finished: {step} steps are done. {more}.")
    lines.append(
        f"The model is in {path / 'pipeline'}; draw from it with: fpdm sample {path} --budget 160 --out samples"
    )
    return "\n".join(lines)
