"""What drawing takes: parts of performance.py, each a function that returns its rows."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import ROUNDS, Timing, compare
from textbook import Textbook
from torch import Tensor

from fpdm import FixedPointDiTPipeline, to_int8
from fpdm.fixedpoint import FixedIterations, solve
from fpdm.models import FixedPointDiT
from fpdm.models.int8 import Int8Linear
from fpdm.models.products import product
from fpdm.sampling import operations_of

BATCHES, ITERATIONS = (8, 1), 10
WIDTHS, SIZES = (96, 192, 384, 768, 1152), (1, 2, 4, 8)
EARLY, LATE, SHORT, LONG = (4, 8, 12, 15), 16, 2, 20
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


class Ceiling:
    """A linear layer of so many tokens, width to 4 width, by torch and by oneDNN: ways to compare with."""

    def __init__(self, rows: int, width: int = 384, times: int = 10):
        tokens, weight = torch.randn(rows, width), torch.randn(4 * width, width)
        self.ways: dict[str, Callable[[], Any]] = {
            "linear": lambda: [F.linear(tokens, weight) for _ in range(times)],
            "oneDNN": lambda: [product(tokens, weight) for _ in range(times)],
        }
        self.operations = times * 2 * tokens.numel() * len(weight)

    def share(self, operations: int, timings: dict[str, Timing]) -> Row:
        """Of the rate of the faster one, that of so many operations in the seconds of "ours"."""
        rate = self.operations / min(timings[way].seconds for way in self.ways)
        achieved = operations / timings["ours"].seconds
        return {"operations": operations, "rate": rate, "share of the matrix rate": achieved / rate}


@torch.no_grad()
def sampling() -> list[Row]:
    """Calls of the network with ten iterations each."""
    model, rows = network().eval(), []
    plain, compiled = Textbook(model).eval(), deepcopy(model)
    compiled.compile_repeated_blocks()
    for size in BATCHES:
        x, t, y = batch_of(size)
        error = (model(x, t, y, iterations=ITERATIONS).sample - plain(x, t, y, ITERATIONS)).abs().max().item()
        ceiling = Ceiling(size * 256)
        ways: dict[str, Callable[[], Any]] = {
            "textbook": partial(plain, x, t, y, ITERATIONS),
            "ours": partial(model, x, t, y, iterations=ITERATIONS),
            "compiled": partial(compiled, x, t, y, iterations=ITERATIONS),
            **ceiling.ways,
        }
        timings = compare(ways, ROUNDS if size > 1 else 3 * ROUNDS)
        operations = size * (operations_of(model).fixed + ITERATIONS * operations_of(model).per_iteration)
        rows.append({
            "batch": size,
            "error": error,
            **asdict(timings["ours"]),
            "compiled": timings["compiled"].ratio,
            **ceiling.share(operations, timings),
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
            tokens, ceiling = torch.randn(size, 256, width), Ceiling(size * 256, width, times=1)
            context, z = model.core.prepare(tokens, torch.randn(size, width)), torch.randn_like(tokens)
            ways = {**ceiling.ways, "ours": lambda model=model, z=z, context=context: model.core(z, context)}
            rows.append({"width": width, "batch": size, **ceiling.share(size * operations, compare(ways, 9))})
    return rows


@torch.no_grad()
def stopping() -> list[Row]:
    """A batch of which some samples have 2 iterations and the others 20, to one in which all have 20: seconds, and the
    sum of iterations."""
    model, rows = network().eval(), []
    x, t, y = batch_of(LATE)
    tokens, time, label = model._embed(x, t, y)
    context = model.core.prepare(tokens, F.silu(time + label))
    for few in EARLY:
        counts = (SHORT,) * few + (LONG,) * (LATE - few)
        ways = {name: partial(solve, model.core, tokens, context, stopping=FixedIterations(n))
                for name, n in (("some", counts), ("all", LONG))}  # fmt: skip
        timing, sums = compare(ways, 7)["all"], sum(counts) / (LATE * LONG)
        rows.append({"finished early": few, "of": LATE, "ratio of seconds": timing.ratio,
                     "quartiles": [timing.low, timing.high], "ratio of sums": sums,
                     "to the sum": timing.ratio / sums})  # fmt: skip
    return rows


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
