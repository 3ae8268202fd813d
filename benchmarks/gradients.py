"""What the ways to differentiate through the fixed point store, take, and how near they are to the true gradient.

    python benchmarks/gradients.py MODEL --out FOLDER     writes FOLDER/gradients.json

Stored and taken: a network of size S/2 (384 wide, 256 tokens), batch 8, float32: bytes that autograd keeps from forward
to backward, counted once per storage without the weights, and seconds of a step forward and backward, medians of
rounds in which the methods take turns, both relative to Jacobian-free backpropagation from the same 6 iterations.
Nearness: the trained MODEL on 32 images of its data in float64: the cosine of a method's gradient of the training loss,
with respect to the core's weights, with the gradient of 200 unrolled iterations. The counts are those of the mean draw
of S-JFB with N = M = 12.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fpdm.data import digits, pixels
from fpdm.diffusion import DiffusionLoss
from fpdm.drawing import load_pipeline
from fpdm.files import model_folder, write_json
from fpdm.fixedpoint import (
    FixedIterations,
    Implicit,
    JacobianFree,
    MultiStepJacobianFree,
    Phantom,
    Solve,
    Tolerance,
    Unroll,
)
from fpdm.machine import made_with
from fpdm.models import FixedPointDiT

N, M, ROUNDS, IMAGES, TRUE = 6, 6, 3, 32, 200


def methods() -> dict[str, Solve]:
    fixed, settled = FixedIterations(N), Tolerance(1e-3, 30)
    return {
        "Jacobian-free": Solve(stopping=fixed, gradient=JacobianFree()),
        "multi-step, 6 and 3": Solve(gradient=MultiStepJacobianFree(N, 3)),
        "multi-step, 6 and 6": Solve(gradient=MultiStepJacobianFree(N, M)),
        "phantom, 6 and 6": Solve(stopping=fixed, gradient=Phantom(M)),
        "implicit, 6 and 1": Solve(stopping=fixed, gradient=Implicit()),
        "implicit, solved to 1e-3": Solve(stopping=settled, gradient=Implicit()),
        "unrolled, 12": Solve(gradient=Unroll(N + M)),
    }


def stored(run: Any, weights: set[int]) -> int:
    """Bytes that autograd keeps while `run` goes forward, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(kept.values())


def costs() -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    model = FixedPointDiT.from_preset("S/2", num_classes=10, sample_size=32, in_channels=4)
    with torch.no_grad():
        for parameter in model.parameters():  # gates that are not zero, so that iterations move
            parameter.add_(0.02 * torch.randn_like(parameter))
    x, y = torch.randn(8, 4, 32, 32), torch.arange(8)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in methods()}
    for name, solve in methods().items():
        found[name] = {"bytes": stored(lambda s=solve: model(x, 500, y, solve=s).sample, weights)}
    for _ in range(ROUNDS):
        for name, solve in methods().items():
            model.zero_grad()
            started = time.perf_counter()
            model(x, 500, y, solve=solve).sample.square().mean().backward()
            seconds[name].append(time.perf_counter() - started)
    for name in found:
        found[name]["seconds"] = median(seconds[name])
    return found


def nearness(folder: str) -> dict[str, float]:
    """Cosines with the true gradient, the mean over three ranges of timesteps."""
    pipe = load_pipeline(model_folder(folder), "cpu", "float32")
    model, loss = pipe.transformer.double().train(), DiffusionLoss(pipe.scheduler)
    source = digits()
    loaded = [source.load(i) for i in range(IMAGES)]
    x0 = torch.stack([pixels(image).double() / 127.5 - 1 for image, _ in loaded])
    y = torch.tensor([label for _, label in loaded])
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(x0.shape, generator=g).double()
    cosines: dict[str, list[float]] = {name: [] for name in methods()}
    for low, high in ((0, 300), (300, 700), (700, 1000)):
        t = torch.randint(low, high, (IMAGES,), generator=g)
        x_t = loss.noisy(x0, noise, t)

        def gradient(solve: Solve, x_t: Tensor = x_t, t: Tensor = t) -> Tensor:
            model.zero_grad()
            loss(model(x_t, t, y, solve=solve).sample, x0, noise, t).total.mean().backward()
            return torch.cat([p.grad.flatten() for p in model.core.parameters() if p.grad is not None])

        true = gradient(Solve(gradient=Unroll(TRUE)))
        for name, solve in methods().items():
            cosines[name].append(torch.cosine_similarity(gradient(solve), true, dim=0).item())
    return {name: sum(values) / len(values) for name, values in cosines.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="trained on the digits")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    near, found = nearness(options.model), costs()
    rows = [{"method": name, **found[name], "cosine": near[name]} for name in found]
    write_json(options.out / "gradients.json", {"made_with": made_with("cpu"), "rows": rows})
    print(json.dumps(rows, indent=1))
