"""What sampling and training take, beside the textbook form, diffusers, and the machine's own ceiling.

    python benchmarks/performance.py [PART ...] --out FOLDER                  writes FOLDER/performance.json
    python benchmarks/performance.py [PART ...] --out FOLDER --device cuda    writes FOLDER/performance-cuda.json

Parts are added to what is there. On a CPU they are sampling, block, int8, shares, stopping, continuous (drawing.py),
training, spent (spent.py), waiting (waiting.py) and start; on a GPU loop, gaps, training (gpu.py) and waiting.
Opponents run in the same process, in turns with ours (harness.py): the textbook form (textbook.py), and diffusers'
DiTTransformer2DModel at the same width. On a CPU the ceiling is a float32 linear layer, 384 to 1536, at the rows of the
network, by torch or by oneDNN, whichever is faster: they take turns with the others. Operations are two per
multiply-add of linear layers and attention. The network has size S/2 and the paper's form: 384 wide, 6 heads, 256
tokens.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import drawing
import gpu
import torch
from drawing import Ceiling, Row, batch_of, network
from harness import bandwidth, compare
from memory import allocated
from spent import NO_GRAD, WITH_GRAD, spent, training_step
from textbook import Textbook
from waiting import waiting

from fpdm import FixedPointDiTPipeline
from fpdm.devices import pick_device
from fpdm.diffusion import make_schedule
from fpdm.files import read_json, write_json
from fpdm.machine import made_with
from fpdm.models import FixedPointDiT
from fpdm.sampling import operations_of

Bar = tuple[str, float, bool]


def training() -> list[Row]:
    """A forward and backward pass with the most iterations of N = 10 and M = 12, and the memory at its peak."""
    model = network()
    plain = Textbook(model)
    ours, (x, t, y) = training_step(model, 8), batch_of(8)

    def textbook() -> None:
        plain.zero_grad()
        plain(x, t, y, NO_GRAD + WITH_GRAD, WITH_GRAD).square().mean().backward()

    ceiling = Ceiling(8 * 256)
    timings = compare({"textbook": textbook, "ours": ours, **ceiling.ways}, 7)
    per_call = operations_of(model)
    operations = 8 * (
        3 * per_call.fixed + (NO_GRAD + 3 * WITH_GRAD) * per_call.per_iteration
    )  # backward: twice forward
    norms = [torch.stack([p.grad.norm() for p in m.parameters() if p.grad is not None]).norm() for m in (model, plain)]
    peaks = {}
    for name, step, m in (("ours", ours, model), ("textbook", textbook, plain)):
        m.zero_grad()
        peaks[name] = allocated(step)
    return [{
        "batch": 8,
        **asdict(timings["ours"]),
        **ceiling.share(operations, timings),
        "error": abs(1 - (norms[0] / norms[1]).item()),
        "peaks": peaks,
        "memory": peaks["ours"] / peaks["textbook"],
    }]  # fmt: skip


ITERATE = """
import os, fpdm.models.core as network
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
    "sampling": drawing.sampling,
    "block": drawing.block,
    "int8": drawing.int8,
    "shares": drawing.shares,
    "stopping": drawing.stopping,
    "continuous": drawing.together,
    "training": training,
    "spent": spent,
    "waiting": waiting,
    "start": start,
}
# Of a part: the number that is held against a bar, the bar, and whether more is better.
BARS: dict[str, list[Bar]] = {
    "sampling": [("ratio", 1.3, True), ("share of the matrix rate", 0.75, True), ("error", 1e-4, False)],
    "block": [("ratio", 1 / 1.15, True)],
    "int8": [("ratio", 1.8, True)],
    "shares": [],
    "stopping": [("to the sum", 1.15, False)],
    "continuous": [],
    "training": [("ratio", 1.25, True), ("memory", 0.6, False)],
    "spent": [],
    "waiting": [],
    "start": [("beyond", 1.5, False)],
}


def tell(part: str, rows: list[Row], bars: list[Bar]) -> None:
    for row in rows:
        for name, bar, more in bars:
            held = row[name] >= bar if more else row[name] <= bar
            spread = f" ({row['low']:.2f} to {row['high']:.2f})" if name == "ratio" else ""
            where = f", batch {row['batch']}" if "batch" in row else ""
            limit = f"at {'least' if more else 'most'} {bar:.3g}"
            print(f"{part + where:22} {name:26} {row[name]:8.3g}{spread:16} {limit:14} {'holds' if held else 'FAILS'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="of those above (all)")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    device = pick_device(options.device)
    parts, bars = (gpu.PARTS, gpu.BARS) if device == "cuda" else (PARTS, BARS)
    if unknown := set(options.parts) - set(parts):
        parser.error(f"unknown part {min(unknown)}; there are {', '.join(parts)}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("performance.json" if device == "cpu" else f"performance-{device}.json")
    result = read_json(path) if path.is_file() else {"parts": {}}
    for part in options.parts or parts:
        rows, made = parts[part](), made_with(device)
        result["parts"][part] = {"rows": rows, "bars": bars[part], "made_with": made, "bandwidth": bandwidth(device)}
        write_json(path, result)
        tell(part, rows, bars[part])


if __name__ == "__main__":
    main()
