"""Draw images from a trained model under a compute budget.

  fpdm sample runs/digits --budget 160 --steps 40 --classes 0-9 --num-images 64 --out samples

writes PNGs, one grid and report.json; with --npz also samples.npz, which the ADM evaluation suite reads. The budget
counts transformer block passes per image. Run again after an interruption, it makes only what is missing.
"""

import argparse
import io
import math
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpdm.cli.processes import leave
from fpdm.cli.quiet import quiet_libraries
from fpdm.files import check_writable, model_folder, read_json
from fpdm.names import PLANNED, needs

if TYPE_CHECKING:
    from fpdm.devices import Processes
    from fpdm.drawing import Choices
    from fpdm.pipeline import FixedPointDiTPipeline
    from fpdm.sampling import Report

DEFAULT_BUDGET = 160
FAR = 2  # times the budget of a tuned plan, beyond which others may well be better
DTYPES = "{float32,bfloat16,float16,int8,float8}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run, a model folder, or a name on the hub")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the images")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz, in the ADM layout")
    parser.add_argument("--trace", action="store_true",
                        help="also plot residuals and passes, and show the first images as they form")  # fmt: skip
    add_drawing_arguments(parser, num_images=16)


def add_drawing_arguments(parser: argparse.ArgumentParser, num_images: int) -> None:
    """What to draw, and at which expense."""
    parser.add_argument("--num-images", type=int, default=num_images, metavar="N", help=f"in all ({num_images})")
    parser.add_argument("--classes", metavar="LIST", help="such as 0-9 or 3,5 or cat,dog; cycled (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="image i of a seed is always the same (0)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (64)")
    compute = parser.add_argument_group("compute")
    compute.add_argument("--budget", type=int, metavar="PASSES", help="transformer block passes per image (160)")
    compute.add_argument("--steps", type=int, metavar="T", help="timesteps; more of them means fewer iterations each")
    compute.add_argument("--iterations", metavar="N[,N...]", help="of the fixed point: at all, or at each timestep")
    compute.add_argument("--allocation", metavar="{constant,linear:S,cosine:S}",
                         help="iterations from noise to image, rising where S > 0 (constant)")  # fmt: skip
    compute.add_argument("--reuse", metavar="{none,plain,linear,quadratic}",
                         help="start each solve from the last one, or where the last ones point (plain)")  # fmt: skip
    compute.add_argument("--solver", metavar="{picard,anderson:M,broyden:M}", help="of the fixed points (picard)")
    compute.add_argument("--tolerance", type=float, metavar="R",
                         help="relative residual at which an image's solve stops")  # fmt: skip
    compute.add_argument("--pooled", action="store_true", help="share what is left over with the batch")
    compute.add_argument("--untuned", action="store_true", help="leave the model's tuned plans out")
    compute.add_argument("--scheduler", metavar="{ddpm,ddim,dpm++,unipc,euler,heun}",
                         help="sampling method (default: the model's)")  # fmt: skip
    guidance = parser.add_argument_group("guidance")
    guidance.add_argument("--guidance-scale", type=float, metavar="S", help="1 for none (1)")
    guidance.add_argument("--guidance-interval", metavar="LOW,HIGH", help="training timesteps to guide at (all)")
    guidance.add_argument("--guidance-channels", type=int, metavar="N", help="how many channels to guide (all)")
    guidance.add_argument("--guidance-share", type=float, metavar="P",
                          help="iterations of the unconditional evaluation, as a share of the others' (1)")  # fmt: skip
    compute.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    compute.add_argument("--dtype", default="float32", metavar=DTYPES, help="of the weights")
    compute.add_argument("--compile", action="store_true",
                         help="compile the blocks (torch.compile): seconds at first, then faster")  # fmt: skip
    compute.add_argument("--cuda-graphs", action="store_true",
                         help="record the kernels of a call, and play them again without Python")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from fpdm.devices import join_processes

    processes = join_processes(options.device)
    with nullcontext() if processes.main else redirect_stdout(io.StringIO()):
        report = draw(options, processes)
    if processes.main:
        tell(options, report)
    if processes.count > 1:
        leave(0)
    return 0


def tell(options: argparse.Namespace, report: "Report") -> None:
    out = Path(options.out)
    diverged = f"; {report.diverged} of them diverged" if report.diverged else ""
    passes = f"{report.spent:g}" if report.spent == report.planned else f"{report.spent:.1f} of {report.planned}"
    images = max(options.num_images, report.images)
    print(f"{images} images in {out}; {passes} block passes each, {report.seconds:.1f} s{diverged}")
    if options.trace:
        print(f"the trace is in {out / 'trace.png'} and {out / 'steps.webp'}")


def draw(options: argparse.Namespace, processes: "Processes | None" = None) -> "Report":
    """Draw what the options ask for into the folder --out, on several processes or this one; the report of it."""
    check_counts(options)
    if getattr(options, "trace", False):
        needs("matplotlib", "plots")
    folder, out = model_folder(options.model), Path(options.out)
    check_writable(out)

    quiet_libraries()
    from fpdm.devices import join_processes
    from fpdm.drawing import draw_missing, load_pipeline, write_archive

    processes = processes or join_processes(options.device)
    pipe = load_pipeline(folder, processes.device, options.dtype, compiled=options.compile, graphs=options.cuda_graphs)
    choices = choices_of(options, pipe)
    classes = parse_classes(options.classes, pipe.transformer.config.num_classes, pipe.class_names)
    print(f"{choices.plan(pipe)} per image", flush=True)
    report = draw_missing(pipe, out, options.num_images, classes, options.batch_size, choices, processes=processes)
    if not processes.main:
        return report
    if getattr(options, "npz", False):
        write_archive(out, options.num_images, classes)
    if getattr(options, "trace", False):
        from fpdm.experiments.trace import write_trace

        write_trace(pipe, choices, classes, report, out)
    return report


def choices_of(options: argparse.Namespace, pipe: "FixedPointDiTPipeline") -> "Choices":
    """How to draw: what the options say, and what they leave open from the tuned plan that is nearest to the budget, if
    the model has any and the options say nothing of a plan."""
    from fpdm.drawing import Choices
    from fpdm.sampling import plan_for

    given = {
        "num_inference_steps": options.steps,
        "iterations": parse_iterations(options.iterations),
        "allocation": options.allocation,
        "reuse": options.reuse,
        "solver": options.solver,
        "tolerance": options.tolerance,
        "scheduler": options.scheduler,
    }
    planned = {name: value for name, value in given.items() if value is not None}
    guidance = {
        "guidance_scale": options.guidance_scale,
        "guidance_interval": parse_interval(options.guidance_interval),
        "guidance_channels": options.guidance_channels,
        "guidance_share": options.guidance_share,
    }
    rest = {name: value for name, value in guidance.items() if value is not None}
    rest |= {"seed": options.seed, "pooled": options.pooled}
    wanted = DEFAULT_BUDGET if options.budget is None else options.budget
    if not planned and not options.untuned and (kept := begun(Path(options.out), (options.budget, wanted))):
        return Choices(**kept, **rest)
    scale = rest.get("guidance_scale", 1.0)
    own = () if options.untuned else pipe.tuned_plans
    tuned = plan_for(own, {"budget": wanted, **planned, **rest})
    if tuned is None:
        if own:
            flags = [f"--{name.replace('num_inference_', '')}" for name in planned] or ["--pooled"] * options.pooled
            why = " ".join(flags) or f"guidance scale {scale:g}"
            print(f"the model's tuned plans are left out, which are not for {why}")
        return Choices(budget=options.budget, **planned, **rest)
    print(f"the tuned plan for {tuned.budget} block passes{'' if wanted == tuned.budget else ', the nearest one'}: "
          f"{tuned.scheduler}, reuse {tuned.reuse}, solver {tuned.solver}")  # fmt: skip
    if not wanted / FAR <= tuned.budget <= wanted * FAR:
        print(f"that is far from {wanted}: `fpdm tune {options.model} --budget {wanted}` finds a plan for it")
    return Choices(**pipe.tuned(wanted, scale), **rest)


def begun(out: Path, budgets: tuple[int | None, ...]) -> dict[str, Any]:
    """The plan that a folder was begun with, if for one of these budgets: it is gone on with so, whatever was tuned
    since."""
    path = out / "request.json"
    kept = read_json(path) if path.is_file() else {}
    if not isinstance(kept, dict) or kept.get("budget") not in budgets:
        return {}
    if isinstance(kept.get("reuse"), bool):  # as older versions had it
        kept["reuse"] = "plain" if kept["reuse"] else "none"
    return {name: kept[name] for name in ("budget", *PLANNED) if kept.get(name) is not None}


def parse_interval(text: str | None) -> list[float] | None:
    """Two numbers from "100,800"."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
        if not math.isfinite(low + high):
            raise ValueError
    except ValueError:
        raise ValueError(f"--guidance-interval is {text!r}; it must be two timesteps, LOW,HIGH") from None
    return [low, high]


def check_counts(options: argparse.Namespace, least: int = 1) -> None:
    if options.num_images < least or options.batch_size < 1:
        raise ValueError(f"--num-images must be at least {least}, --batch-size at least 1")


def parse_iterations(text: str | None) -> int | list[int] | None:
    """ "4" or "4,2,2"."""
    if text is None:
        return None
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--iterations is {text!r}; it must be a number, or numbers joined by commas") from None
    return counts if "," in text else counts[0]


def parse_classes(text: str | None, count: int, names: list[str]) -> list[int] | None:
    """Class numbers from "0-9", "3,5" or names; all classes by default, None for an unconditional model. A number
    that a class has for its name means that one, in a range, too."""
    if text is None:
        return list(range(count)) or None
    if count == 0:
        raise ValueError("this model is unconditional: it has no classes. Leave --classes out")
    labels: list[Any] = []
    numbered = {int(name): label for label, name in enumerate(names) if name.isdecimal()}  # as folders may be called
    for given in text.split(","):
        part = given if given in names else given.strip()
        first, dash, last = part.partition("-")
        if part in names:
            labels.append(names.index(part))
        elif first.isdecimal() and (last.isdecimal() or not dash):
            ends = int(first), int(last or first)
            if ends[0] > ends[1]:
                raise ValueError(f"--classes {part} is a range that falls: write {ends[1]}-{ends[0]}")
            for number in range(ends[0], ends[1] + 1):
                label = numbered.get(number, number)
                if label >= count:
                    raise ValueError(f"class {number} is out of range: this model has classes 0 to {count - 1}")
                labels.append(label)
        else:
            labels.append(part)  # the pipeline says what is wrong with it
    if not labels:
        raise ValueError(f"--classes {text!r} names no class")
    return labels
