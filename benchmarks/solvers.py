"""Which solver pays at which number of iterations: the error that is left, and what the histories cost.

    python benchmarks/solvers.py MODEL --out FOLDER     writes FOLDER/solvers.json and FOLDER/solvers.png

Along the model's own trajectories (20 timesteps under DDIM, 32 images, each solve from the last solution as reuse has
it), every solver runs 1 to 8 iterations at every timestep. Kept are the residual |f(z) - z| / |f(z)| of the value
that it returns, and the root mean square error of the predicted x0 against 36 plain iterations: medians over images,
geometric means over timesteps. Seconds are medians of solves of 8 iterations, the solvers taking turns, relative to
plain ones.
"""

import argparse
import json
import math
import time
from pathlib import Path
from statistics import geometric_mean, median

import torch

from fpdm.drawing import load_pipeline
from fpdm.files import model_folder, write_aside, write_json
from fpdm.fixedpoint import FixedIterations, Solve, relative_residual
from fpdm.machine import made_with
from fpdm.models.denoiser import condition
from fpdm.sampling import Stepper, image_generators, initial_noise, solver_of
from fpdm.sampling.reuse import Carry

SOLVERS = ("picard", "picard:0.8", "anderson:1", "anderson:2", "anderson:5", "broyden")
COUNTS = range(1, 9)
TIMESTEPS, IMAGES, CONVERGED, TURNS = 20, 32, 36, 15


@torch.no_grad()
def measure(folder: str) -> dict:
    pipe = load_pipeline(model_folder(folder), "cpu", "float32")
    model = pipe.transformer
    stepper = Stepper(pipe.scheduler, "ddim", TIMESTEPS, model.config.learned_variance)
    x = initial_noise(model, image_generators(0, range(IMAGES)))
    y = torch.arange(IMAGES) % max(1, model.config.num_classes)
    carry, rows = Carry("plain"), []
    seconds: dict[str, list[float]] = {name: [] for name in SOLVERS}
    for index, t in enumerate(stepper.timesteps):
        level = stepper.level(index)
        init = carry.start(level, IMAGES)
        best = model(x, t, y, iterations=CONVERGED, init=init)
        f, context = function(model, x, t, y)
        for name in SOLVERS:
            for n in COUNTS:
                solve = Solve(stopping=FixedIterations(n), solver=solver_of(name))
                found = model(x, t, y, solve=solve, init=init)
                z = found.solution.value
                residual = relative_residual(z, f(z, context)).median().item()
                channels = x.shape[1]
                wrong = (found.sample - best.sample)[:, :channels].square().flatten(1).mean(1).sqrt().median().item()
                rows.append({"timestep": t, "solver": name, "iterations": n, "residual": residual,
                             "error": wrong * scale(stepper, level)})  # fmt: skip
        for _ in range(TURNS if index == TIMESTEPS // 2 else 0):
            for name in SOLVERS:
                solve = Solve(stopping=FixedIterations(COUNTS[-1]), solver=solver_of(name))
                started = time.perf_counter()
                solve(f, z, context)
                seconds[name].append(time.perf_counter() - started)
        carry.add(level, model(x, t, y, iterations=2, init=init).solution.value)
        x = stepper.step(best.sample, index, x, [])
    plain = median(seconds["picard"])
    return {
        "model": Path(folder).name,
        "made_with": made_with("cpu"),
        "seconds": {name: median(values) / plain for name, values in seconds.items()},
        "means": means(rows),
        "rows": rows,
    }


def function(model, x, t, y):
    """The fixed point function of a batch, and its context."""
    tokens, time_embedding, label = model._embed(x, t, y)
    outer = condition(time_embedding, label) if model.config.time_in_pre_post else condition(label)
    u = model._run_blocks(model.pre, tokens, outer)
    return model.core, model.core.prepare(u, condition(time_embedding, label))


def scale(stepper: Stepper, alpha_bar: float) -> float:
    """How an error of the prediction becomes one of x0."""
    noise = math.sqrt(1 - alpha_bar)
    return {"sample": 1.0, "v_prediction": noise, "epsilon": noise / math.sqrt(alpha_bar)}[stepper.kind]


def means(rows: list[dict]) -> list[dict]:
    found = []
    for name in SOLVERS:
        for n in COUNTS:
            some = [row for row in rows if (row["solver"], row["iterations"]) == (name, n)]
            averages = {key: geometric_mean(row[key] for row in some) for key in ("residual", "error")}
            found.append({"solver": name, "iterations": n, **averages})
    return found


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharex=True)
    for axis, key, label in zip(axes, ("residual", "error"), ("relative residual", "error of x0"), strict=True):
        for name in SOLVERS:
            some = [row for row in result["means"] if row["solver"] == name]
            cost = f"{name}, {result['seconds'][name]:.2f} x the time"
            axis.semilogy([row["iterations"] for row in some], [row[key] for row in some], marker=".", label=cost)
        axis.set(xlabel="iterations", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.suptitle(f"{result['model']}: what is left after so many iterations")
    figure.savefig(path, format="png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", help="what the model is called in the result")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = measure(options.model)
    result["model"] = options.name or result["model"]
    write_json(options.out / "solvers.json", result)
    write_aside(options.out / "solvers.png", lambda aside: plot(result, aside))
    print(json.dumps({"seconds": result["seconds"]}, indent=1))
    for row in result["means"]:
        left = f"residual {row['residual']:.2e}, error {row['error']:.2e}"
        print(f"{row['solver']:12} {row['iterations']} iterations: {left}")
