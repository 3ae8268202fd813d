"""The time of a batch follows the sum of its iterations, not the most: samples that are finished leave it.

    python benchmarks/stopping.py --out FOLDER     writes FOLDER/stopping.json

One S/2-like core (384 wide, 6 heads, 64 tokens), a batch of 32. Pairs in one process, taking turns, medians of ratios:
a batch of which some samples have 2 iterations and the others 20, against one in which all have 20. Beside each ratio
stands that of the sums of iterations.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median, quantiles

import torch

from fpdm.files import write_json
from fpdm.fixedpoint import FixedIterations, solve
from fpdm.machine import made_with
from fpdm.models import FixedPointDiT

BATCH, LONG, SHORT, TURNS = 32, 20, 2, 7


@torch.no_grad()
def measure() -> list[dict]:
    torch.manual_seed(0)
    model = FixedPointDiT(sample_size=16, hidden_size=384, num_heads=6, num_classes=10)
    x, y = torch.randn(BATCH, 4, 16, 16), torch.arange(BATCH) % 10
    tokens, t, label = model._embed(x, 500, y)
    context = model.core.prepare(tokens, torch.nn.functional.silu(t + label))

    def seconds(counts: int | tuple[int, ...]) -> float:
        started = time.perf_counter()
        solve(model.core, tokens, context, stopping=FixedIterations(counts))
        return time.perf_counter() - started

    rows = []
    for share in (0.25, 0.5, 0.75, 0.9375):
        few = round(BATCH * share)
        counts = (SHORT,) * few + (LONG,) * (BATCH - few)
        seconds(counts), seconds(LONG)
        ratios = [seconds(counts) / seconds(LONG) for _ in range(TURNS)]
        low, _, high = quantiles(ratios, n=4)
        rows.append({"finished early": few, "of": BATCH, "ratio of seconds": median(ratios), "quartiles": [low, high],
                     "ratio of sums": sum(counts) / (BATCH * LONG)})  # fmt: skip
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"made_with": made_with("cpu"), "rows": measure()}
    write_json(options.out / "stopping.json", result)
    print(json.dumps(result["rows"], indent=1))
