"""The demo: digits, three budgets, one picture."""

from pathlib import Path
from typing import Any

from PIL import Image

from fpdm.imaging import grid
from fpdm.names import needs
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.recipes import recipe
from fpdm.sampling import Report
from fpdm.training.loop import Trainer

BUDGETS = (12, 48, 192)  # block passes per image
CLASSES = list(range(10)) * 2
GUIDANCE = 2.0  # of so small a model, it makes the digits plainly those asked for


def run_demo(out: Path, steps: int | None = None) -> int:
    """Train the digits recipe in `out`/run (or go on with it), draw, print the table, write `out`/demo.png."""
    needs("matplotlib", "plots")
    config = recipe("digits")
    trainer = Trainer(config if steps is None else config.with_fields(steps=steps), out / "run")
    print(trainer.summary(), flush=True)
    if trainer.run() == "interrupted":
        print(f"Saved at step {trainer.step}. The same command goes on from there.")
        return 130

    pipe = FixedPointDiTPipeline.from_pretrained(trainer.dir.pipeline)
    pipe.set_progress_bar_config(disable=True)
    rows: list[tuple[list[Image.Image], Report]] = []
    print(f"\n{'budget':>8} {'timesteps x iterations':>24} {'passes spent':>14} {'with guidance':>15} {'seconds':>9}")
    for budget in BUDGETS:
        drawn = pipe(CLASSES, budget=budget, scheduler="unipc", guidance_scale=GUIDANCE, seed=0)
        images, report = drawn.images, drawn.report
        rows.append((images, report))
        plan = f"{len(report.timesteps)} x {spread(report)}"
        print(f"{budget:8} {plan:>24} {report.spent:14.0f} {report.total_passes:15.0f} {report.seconds:9.2f}")
    picture = out / "demo.png"
    draw(rows, picture)
    print(f"\nThe picture is {picture}; the model is {trainer.dir.pipeline}.")
    print(f"More of it: fpdm sample {trainer.dir.path} --budget 80 --classes 0-9 --num-images 100 --out samples")
    return 0


def spread(report: Report) -> str:
    """The iterations per timestep: "2", or "2 to 3"."""
    counts = sorted({n for n in report.iterations if n is not None})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def draw(rows: list[tuple[list[Image.Image], Report]], path: Path) -> None:
    """One picture: a strip of images per budget on the left, the residuals over the timesteps on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = plt.figure(figsize=(12, 1.6 * len(rows) + 0.6), layout="constrained")
    strips, curves = figure.subfigures(1, 2, width_ratios=[2, 1.1])
    for axis, (images, report) in zip(strips.subplots(len(rows), 1), rows, strict=True):
        show_strip(axis, images)
        plan = f"{len(report.timesteps)} timesteps x {spread(report)} iteration{'s' * (spread(report) != '1')}"
        axis.set_title(f"{report.spent:.0f} block passes: {plan}", loc="left", fontsize=10)
    axis = curves.subplots()
    for _, report in rows:
        axis.plot(report.timesteps, report.residual, marker=".", label=f"{report.spent:.0f} passes")
    axis.set(xlabel="timestep (noise to image)", ylabel="residual |f(z) - z| / |f(z)|", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend(loc="best", ncols=len(rows), columnspacing=1.0, handlelength=1.2)
    axis.margins(y=0.2)
    axis.set_title("How far each fixed point was solved", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show_strip(axis: Any, images: list[Image.Image]) -> None:
    """Images of 8 x 8 pixels in two rows, enlarged smoothly: the eye reads edges of pixels, not digits, otherwise."""
    large = [image.resize((64, 64), Image.Resampling.BICUBIC) for image in images]
    axis.imshow(grid(large, columns=len(images) // 2, gap=6), cmap="gray", vmin=0, vmax=255)
    axis.axis("off")
