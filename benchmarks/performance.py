"""What sampling and training take, beside the textbook form, diffusers, and the machine's own ceiling.

    python benchmarks/performance.py [PART ...] --out FOLDER     writes FOLDER/performance.json, adds parts to it

Parts, all by default: sampling, block, int8, shares, stopping, continuous, training, start. Opponents run in the same process, in turns with ours (see
harness.py): the textbook form (textbook.py), and diffusers' DiTTransformer2DModel at the same width. The ceiling is a
float32 linear layer, 384 to 1536, at the rows of the network, by torch or by oneDNN, whichever is faster: they take
turns with the others. Operations are two per multiply-add of linear layers and attention. The network has size S/2 and
the paper's form: 384 wide, 6 heads, 256 tokens.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from harness import ROUNDS, bandwidth, compare
from memory import allocated
from stopping import measure as stopping_early
from textbook import Textbook
from torch import Tensor

from fpdm import FixedPointDiTPipeline, to_int8
from fpdm.diffusion import make_schedule
from fpdm.files import read_json, write_json
from fpdm.fixedpoint import MultiStepJacobianFree, Solve
from fpdm.machine import made_with
from fpdm.models import FixedPointDiT
from fpdm.models.int8 import Int8Linear
from fpdm.models.products import product
from fpdm.sampling import operations_of

BATCHES, ITERATIONS = (8, 1), 10
WIDTHS, SIZES = (96, 192, 384, 768, 1152), (1, 2, 4, 8)
NO_GRAD, WITH_GRAD = 10, 12
Row = dict[str, Any]


def network() -> FixedPointDiT:
    """Of size S/2, its weights such that nothing is zero and iterations converge."""
    torch.manual_seed(0)
    model = FixedPointDiT.from_preset("S/2", num_classes=1000, sample_size=32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def batch_of(size: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(size, 4, 32, 32, generator=g), torch.full((size,), 500.0), torch.arange(size)


@torch.no_grad()
def sampling() -> list[Row]:
    """Calls of the network with ten iterations each."""
    model, rows = network().eval(), []
    plain, compiled = Textbook(model).eval(), deepcopy(model)
    compiled.compile_repeated_blocks()
    for size in BATCHES:
        x, t, y = batch_of(size)
        error = (model(x, t, y, iterations=ITERATIONS).sample - plain(x, t, y, ITERATIONS)).abs().max().item()
        tokens, weight = torch.randn(size * 256, 384), torch.randn(1536, 384)
        ways: dict[str, Callable[[], Any]] = {
            "textbook": partial(plain, x, t, y, ITERATIONS),
            "ours": partial(model, x, t, y, iterations=ITERATIONS),
            "compiled": partial(compiled, x, t, y, iterations=ITERATIONS),
            "linear": lambda tokens=tokens, weight=weight: [F.linear(tokens, weight) for _ in range(10)],
            "oneDNN": lambda tokens=tokens, weight=weight: [product(tokens, weight) for _ in range(10)],
        }
        timings = compare(ways)
        operations = size * (operations_of(model).fixed + ITERATIONS * operations_of(model).per_iteration)
        rate = 10 * 2 * tokens.numel() * 1536 / min(timings["linear"].seconds, timings["oneDNN"].seconds)
        rows.append({
            "batch": size,
            "error": error,
            **asdict(timings["ours"]),
            "compiled": timings["compiled"].ratio,
            "operations": operations,
            "rate": rate,
            "share of the matrix rate": operations / timings["ours"].seconds / rate,
        })  # fmt: skip
    return rows


@torch.no_grad()
def block() -> list[Row]:
    """One fixed point iteration, and one block of diffusers' DiT: how many times the seconds of the latter."""
    from diffusers import DiTTransformer2DModel

    model, rows = network().eval(), []
    other = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=1, sample_size=32
    ).eval()
    for size in BATCHES:
        x, t, y = batch_of(size)
        tokens, time, label = model._embed(x, t, y)
        context, z = model.core.prepare(tokens, F.silu(time + label)), torch.randn_like(tokens)
        timings = compare({
            "diffusers": lambda z=z, t=t, y=y: other.transformer_blocks[0](z, timestep=t.long(), class_labels=y),
            "ours": lambda z=z, context=context: model.core(z, context),
        }, 3 * ROUNDS)  # fmt: skip
        rows.append({"batch": size, **asdict(timings["ours"])})
    return rows


@torch.no_grad()
def int8() -> list[Row]:
    """Calls as in `sampling`, in int8 and in float32, compiled and not; and a linear layer alone, 384 to 1536: what
    would be gained if nothing else were in a block."""
    kinds = {"float32": network().eval(), "int8": to_int8(network().eval())}
    for name, model in list(kinds.items()):
        kinds[f"{name} compiled"] = deepcopy(model)
        kinds[f"{name} compiled"].compile_repeated_blocks()
    layer, rows = torch.nn.Linear(384, 1536), []
    rounded = Int8Linear(layer)
    for size in BATCHES:
        x, t, y = batch_of(size)
        calls = {name: partial(model, x, t, y, iterations=ITERATIONS) for name, model in kinds.items()}
        float32, eight = (calls[name]().sample for name in ("float32", "int8"))
        timings, tokens = compare(calls), torch.randn(size * 256, 384)
        both = compare({"float32": lambda tokens=tokens: product(tokens, layer.weight, layer.bias),
                        "int8": lambda tokens=tokens: rounded(tokens)}, 3 * ROUNDS)  # fmt: skip
        compiled = compare({name: calls[name] for name in ("float32 compiled", "int8 compiled")})
        rows.append({
            "batch": size,
            **asdict(compiled["int8 compiled"]),
            "not compiled": timings["int8"].ratio,
            "compiled float32": timings["float32 compiled"].ratio,
            "linear layer": both["int8"].ratio,
            "difference": ((eight - float32).norm() / float32.norm()).item(),
        })  # fmt: skip
    return rows


@torch.no_grad()
def shares() -> list[Row]:
    """The share of the matrix rate that an iteration reaches, by width and batch."""
    rows = []
    for width in WIDTHS:
        torch.manual_seed(0)
        model = FixedPointDiT(sample_size=32, hidden_size=width, num_heads=width // 64 or 1, num_classes=1000)
        model.core.requires_grad_(False)
        operations = operations_of(model).per_iteration
        for size in SIZES:
            tokens, weight = torch.randn(size, 256, width), torch.randn(4 * width, width)
            context, z = model.core.prepare(tokens, torch.randn(size, width)), torch.randn_like(tokens)
            timings = compare({
                "linear": lambda tokens=tokens, weight=weight: F.linear(tokens, weight),
                "oneDNN": lambda tokens=tokens, weight=weight: product(tokens, weight),
                "ours": lambda model=model, z=z, context=context: model.core(z, context),
            }, 9)  # fmt: skip
            fastest = min(timings["linear"].seconds, timings["oneDNN"].seconds)
            rate = 2 * tokens.numel() * 4 * width / fastest
            share = size * operations / timings["ours"].seconds / rate
            rows.append({"width": width, "batch": size, "rate": rate, "share of the matrix rate": share})
    return rows


def stopping() -> list[Row]:
    """A batch of which some samples stop early: its seconds, and the sum of its iterations, to one of which none do."""
    return [{**row, "to the sum": row["ratio of seconds"] / row["ratio of sums"]} for row in stopping_early()]


@torch.no_grad()
def together() -> list[Row]:
    """Images of the model inside the package, drawn by `continuous` and in other ways: seconds of those to its own."""
    pipe = FixedPointDiTPipeline.from_pretrained("fashion-mnist")
    pipe.set_progress_bar_config(disable=True)
    plans = [{"budget": b, "num_inference_steps": n, "scheduler": "unipc", "output_type": "latent"}
             for b, n in ((24, 6), (40, 10), (48, 8), (60, 12), (80, 10), (80, 20), (100, 25), (160, 20))]  # fmt: skip
    calls = [{**plan, "class_labels": i % 10, "image_indices": [i]} for i in range(4) for plan in plans]
    same = {"budget": 80, "num_inference_steps": 10, "scheduler": "unipc", "output_type": "latent", "tolerance": 0.03}
    some = [list(range(i, i + 32)) for i in (0, 32, 64)]

    def batches() -> None:
        for indices in some:
            pipe([i % 10 for i in indices], image_indices=indices, **same)

    singles = [{"class_labels": i % 10, "image_indices": [i], **same} for part in some for i in part]
    kinds: dict[str, dict[str, Callable[[], Any]]] = {
        "32 calls of one image, 8 plans": {
            "one by one": lambda: [pipe(**call) for call in calls],
            "a batch for each plan": lambda: [
                pipe([0, 1, 2, 3], image_indices=range(4), **plan) for plan in plans
            ],
            "continuous": lambda: list(pipe.continuous(calls, 32)),
        },
        "96 images of one plan, tolerance 0.03": {
            "batches of 32": batches,
            "continuous": lambda: list(pipe.continuous(singles, 32)),
        },
    }  # fmt: skip
    rows = []
    for what, ways in kinds.items():
        timings = compare(ways, 7)
        own = timings.pop("continuous")
        seconds = {way: timing.seconds / own.seconds for way, timing in timings.items()}
        rows.append({"what": what, "seconds": own.seconds, "of others": seconds})
    return rows


def training() -> list[Row]:
    """A forward and backward pass with the most iterations of N = 10 and M = 12, and the memory at its peak."""
    model = network()
    plain = Textbook(model)
    solve = Solve(gradient=MultiStepJacobianFree(NO_GRAD, WITH_GRAD))
    x, t, y = batch_of(8)

    def ours() -> None:
        model.zero_grad()
        model(x, t, y, solve=solve).sample.square().mean().backward()

    def textbook() -> None:
        plain.zero_grad()
        plain(x, t, y, NO_GRAD + WITH_GRAD, WITH_GRAD).square().mean().backward()

    timing = compare({"textbook": textbook, "ours": ours}, 5)["ours"]
    norms = [torch.stack([p.grad.norm() for p in m.parameters() if p.grad is not None]).norm() for m in (model, plain)]
    peaks = {}
    for name, step, m in (("ours", ours, model), ("textbook", textbook, plain)):
        m.zero_grad()
        peaks[name] = allocated(step)
    return [{"batch": 8, **asdict(timing), "error": abs(1 - (norms[0] / norms[1]).item()), "peaks": peaks,
             "memory": peaks["ours"] / peaks["textbook"]}]  # fmt: skip


ITERATE = """
import os, fpdm.models.fixed_point_dit as network
network.FixedPointCore.forward = lambda *_: os._exit(0)
from fpdm.cli.main import main
main(["sample", {model!r}, "--budget", "3", "--num-images", "1", "--device", "cpu", "--out", {out!r}])
"""
IMPORT = "import os, torch; from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin; os._exit(0)"


def start() -> list[Row]:
    """Processes from their start to the first iteration of `fpdm sample`, and such as import its libraries only."""
    with TemporaryDirectory() as folder:
        model = FixedPointDiT(sample_size=8, in_channels=1, hidden_size=96, num_heads=4, num_classes=10)
        FixedPointDiTPipeline(model, make_schedule()).save_pretrained(f"{folder}/model")
        words = ITERATE.format(model=f"{folder}/model", out=f"{folder}/out")

        def process(program: str) -> None:
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)

        timings = compare({"imports": partial(process, IMPORT), "sample": partial(process, words)}, 5)
    beyond = timings["sample"].seconds - timings["imports"].seconds
    return [{"imports": timings["imports"].seconds, "sample": timings["sample"].seconds, "beyond": beyond}]


PARTS: dict[str, Callable[[], list[Row]]] = {
    "sampling": sampling, "block": block, "int8": int8, "shares": shares, "stopping": stopping, "continuous": together,
    "training": training, "start": start,
}  # fmt: skip
# Of a part: the number that is held against a bar, the bar, and whether more is better.
BARS = {
    "sampling": [("ratio", 1.3, True), ("share of the matrix rate", 0.75, True), ("error", 1e-4, False)],
    "block": [("ratio", 1 / 1.15, True)],
    "int8": [("ratio", 1.8, True)],
    "shares": [],
    "stopping": [("to the sum", 1.15, False)],
    "continuous": [],
    "training": [("ratio", 1.25, True), ("memory", 0.6, False)],
    "start": [("beyond", 1.5, False)],
}


def tell(part: str, rows: list[Row]) -> None:
    for row in rows:
        for name, bar, more in BARS[part]:
            held = row[name] >= bar if more else row[name] <= bar
            spread = f" ({row['low']:.2f} to {row['high']:.2f})" if name == "ratio" else ""
            where = f", batch {row['batch']}" if "batch" in row else ""
            limit = f"at {'least' if more else 'most'} {bar:.3g}"
            print(f"{part + where:22} {name:26} {row[name]:8.3g}{spread:16} {limit:14} {'holds' if held else 'FAILS'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)}; there are {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "performance.json"
    result = read_json(path) if path.is_file() else {"parts": {}}
    for part in options.parts or PARTS:
        rows = PARTS[part]()
        result["parts"][part] = {
            "rows": rows,
            "bars": BARS[part],
            "made_with": made_with("cpu"),
            "bandwidth": bandwidth(),
        }
        write_json(path, result)
        tell(part, rows)


if __name__ == "__main__":
    main()
