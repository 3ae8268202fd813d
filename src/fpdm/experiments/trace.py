"""A sampling, seen: how well each fixed point was solved, what was spent where, and the images as they form."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fpdm.drawing import Choices, cycled
from fpdm.files import write_aside
from fpdm.imaging import grid
from fpdm.names import needs
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.sampling import Report

SHOWN = 8  # images in the strip
FRAMES = 100  # at most
SECONDS = 6  # that the strip takes


def write_trace(
    pipe: FixedPointDiTPipeline, choices: Choices, classes: list[int] | None, report: Report, out: Path
) -> None:
    """Write `out`/trace.png, plots of a report, and `out`/steps.webp, an animation of the first images, which are drawn
    once more. Needs matplotlib."""
    needs("matplotlib", "plots")
    write_aside(out / "trace.png", lambda aside: plot_report(report, choices.plan(pipe).passes, aside))
    frames = frames_of(pipe, choices, cycled(classes, SHOWN))
    duration = max(20, 1000 * SECONDS // len(frames))
    pauses = [duration] * (len(frames) - 1) + [2000]
    write_aside(
        out / "steps.webp",
        lambda aside: frames[0].save(
            aside, format="WEBP", save_all=True, append_images=frames[1:], duration=pauses, loop=0, lossless=True
        ),
    )


def frames_of(pipe: FixedPointDiTPipeline, choices: Choices, labels: list[int] | None) -> list[Image.Image]:
    """The first images after each timestep, in a row each; of many timesteps, evenly chosen ones."""
    strips: list[Image.Image] = []
    steps = choices.plan(pipe).num_steps
    wanted = {round(place) for place in np.linspace(0, steps - 1, min(steps, FRAMES))}

    def on_step_end(pipeline: FixedPointDiTPipeline, index: int, t: int, given: dict[str, Tensor]) -> None:
        if index in wanted:
            strips.append(grid(pipeline.decode(given["latents"]), columns=SHOWN, least=96))

    pipe.set_progress_bar_config(disable=True)
    count = SHOWN if labels is None else len(labels)
    pipe(labels, count, **choices.to_dict(), image_indices=range(count), callback_on_step_end=on_step_end)
    return strips


def plot_report(report: Report, planned: Sequence[int], path: str | os.PathLike) -> None:
    """Residuals by iteration and timestep as a heat-map; the last of each timestep; `planned` block passes per timestep
    against those spent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(3, 1, figsize=(9, 8), layout="constrained", sharex=True)
    heat, last, spent = axes
    places = np.arange(len(report.timesteps))
    if report.residuals:
        table = np.full((max(map(len, report.residuals)), len(places)), np.nan)
        for column, row in enumerate(report.residuals):
            table[: len(row), column] = [np.nan if r is None else r for r in row]
        shown = heat.imshow(
            np.log10(np.maximum(table, 1e-12)), aspect="auto", origin="lower", cmap="viridis_r",
            extent=(-0.5, len(places) - 0.5, 0.5, len(table) + 0.5),
        )  # fmt: skip
        figure.colorbar(shown, ax=heat, label="log10 of the relative residual")
        heat.yaxis.set_major_locator(MaxNLocator(integer=True))
        heat.set_ylabel("iteration")
        last.semilogy(places, report.residual, marker=".", color="#0072b2")
    else:
        heat.text(0.5, 0.5, "this network has no iterations", ha="center", transform=heat.transAxes)
    last.set_ylabel("residual left")
    last.grid(alpha=0.3)
    spent.step(places, planned, where="mid", color="#666", label=f"planned, {sum(planned):g} in all")
    spent.bar(places, report.passes, color="#0072b2", alpha=0.6, label=f"spent, {report.spent:g} on average")
    spent.set(ylabel="block passes", xlabel="timestep, from noise to image")
    spent.set_ylim(top=1.25 * max([*planned, *report.passes]))
    spent.legend(loc="upper right", ncols=2)
    ticks = places[:: max(1, len(places) // 12)]
    spent.set_xticks(ticks, [str(report.timesteps[i]) for i in ticks])
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)
