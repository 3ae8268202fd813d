"""What drawing and training take on a GPU: parts of performance.py with `--device cuda`. XL/2 at 32x32x4, bfloat16.

The matrix rate is that of a linear layer of the network, 1152 to 4608, at the same rows and in bfloat16. A timestep is
a call of the network with ten iterations.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from drawing import Row
from harness import compare
from textbook import Textbook
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from waiting import waiting

from fpdm import DiT, FixedPointDiT, to_float8
from fpdm.fixedpoint import FixedIterations, MultiStepJacobianFree, Solve, solve
from fpdm.models import Denoiser
from fpdm.sampling import operations_of

ITERATIONS, NO_GRAD, WITH_GRAD = 10, 10, 12
CUDA, ROUNDS = "cuda", 9


def network(kind: type[Denoiser] = FixedPointDiT) -> Denoiser:
    """Of size XL/2, its weights such that nothing is zero."""
    torch.manual_seed(0)
    model = kind.from_preset("XL/2", num_classes=1000, sample_size=32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model.to(CUDA)


def batch_of(size: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, t, y = torch.randn(size, 4, 32, 32, generator=g), torch.full((size,), 500.0), torch.arange(size)
    return x.to(CUDA, dtype), t.to(CUDA), y.to(CUDA)


def ways_of(model: Denoiser) -> dict[str, Denoiser]:
    """A network in bfloat16 as it is, compiled, recorded, and both; and in float8, if this GPU has it."""
    kinds = {"eager": model.eval().to(torch.bfloat16)}
    for name in ("graphs", "compiled", "ours", "float8"):
        kinds[name] = deepcopy(kinds["eager"])
        if name == "float8":
            try:
                to_float8(kinds[name])
            except ValueError:
                del kinds[name]
                continue
        if name != "graphs":
            kinds[name].compile_repeated_blocks()
        if name != "compiled":
            kinds[name].enable_cuda_graphs()
    return kinds


@torch.no_grad()
def loop() -> list[Row]:
    """The fixed point loop at batch 64: its share of the matrix rate; and calls, to the textbook form in float32."""
    plain = network()
    textbook, kinds = Textbook(plain).to(CUDA).eval(), ways_of(deepcopy(plain))
    (x, t, y), (x32, _, _) = batch_of(64), batch_of(64, torch.float32)
    expected = textbook(x32, t, y, ITERATIONS)
    errors = {
        name: ((m(x, t, y, iterations=ITERATIONS).sample.float() - expected).norm() / expected.norm()).item()
        for name, m in kinds.items()
    }
    calls = {name: partial(m, x, t, y, iterations=ITERATIONS) for name, m in kinds.items()}
    timings = compare({"textbook": partial(textbook, x32, t, y, ITERATIONS), **calls}, ROUNDS, CUDA)

    model = kinds["compiled"]
    u, context, _ = model.encode(x, t, y)
    tokens = torch.randn(64 * 256, 1152, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(4608, 1152, device=CUDA, dtype=torch.bfloat16)
    solves = compare({
        "linear": lambda: [F.linear(tokens, weight) for _ in range(ITERATIONS)],
        "loop": lambda: solve(model.core, u, context, stopping=FixedIterations(ITERATIONS)),
    }, ROUNDS, CUDA)  # fmt: skip
    rate = ITERATIONS * 2 * tokens.numel() * 4608 / solves["linear"].seconds
    achieved = 64 * ITERATIONS * operations_of(model).per_iteration / solves["loop"].seconds
    others = {name: timings[name].ratio for name in kinds}
    return [{"batch": 64, **asdict(timings["ours"]), "rate": rate, "share of the matrix rate": achieved / rate,
             "ratios": others, "errors": errors, "error": errors["ours"]}]  # fmt: skip


@torch.no_grad()
def gaps() -> list[Row]:
    """Calls at batch 1: the share of their seconds in which no kernel runs."""
    found, (x, t, y) = {}, batch_of(1)
    for name, model in ways_of(network()).items():
        call = partial(model, x, t, y, iterations=ITERATIONS)
        seconds = compare({"call": lambda call=call: [call() for _ in range(20)]}, ROUNDS, CUDA)["call"].seconds / 20
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(20):
                call()
            torch.cuda.synchronize()
        busy = sum(event.self_device_time_total for event in seen.key_averages()) / 20 / 1e6
        found[name] = {"seconds": seconds, "busy": busy, "gaps": max(0.0, 1 - busy / seconds)}
    return [{"batch": 1, **found["ours"], "ways": found}]


def peak(model: Denoiser, **solving: Solve) -> dict[str, float]:
    """Bytes at the peak of a step of training at batch 32 in bfloat16, and its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, t, y = batch_of(32, torch.float32)

    def step() -> None:
        with torch.autocast(CUDA, torch.bfloat16):
            model(x, t, y, **solving).sample.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.reset_peak_memory_stats()
    seconds = compare({"step": step}, 3, CUDA)["step"].seconds
    return {"bytes": torch.cuda.max_memory_allocated(), "seconds": seconds}


def training() -> list[Row]:
    """Steps at batch 32 under autocast: peak memory to that of DiT-XL/2, and with checkpointing to that without."""
    found = {}
    for name, kind, solving in (
        ("DiT", DiT, {}),
        ("FPDM", FixedPointDiT, {"solve": Solve(gradient=MultiStepJacobianFree(NO_GRAD, WITH_GRAD))}),
    ):
        for checkpointing in (False, True):
            model = network(kind).train()
            if checkpointing:
                model.enable_gradient_checkpointing()
            found[name, checkpointing] = peak(model, **solving)
            del model
            torch.cuda.empty_cache()
    plain, saving = (found["FPDM", checkpointing]["bytes"] for checkpointing in (False, True))
    steps = [{"network": name, "checkpointing": saved, **step} for (name, saved), step in found.items()]
    return [{"batch": 32, "memory": plain / found["DiT", False]["bytes"], "with checkpointing": saving / plain,
             "steps": steps}]  # fmt: skip


PARTS: dict[str, Callable[[], list[Row]]] = {
    "loop": loop,
    "gaps": gaps,
    "training": training,
    "waiting": partial(waiting, CUDA),
}
BARS = {
    "loop": [("share of the matrix rate", 0.6, True), ("ratio", 6.0, True)],
    "gaps": [("gaps", 0.05, False)],
    "training": [("memory", 0.4, False), ("with checkpointing", 1.0, False)],
    "waiting": [],
}
