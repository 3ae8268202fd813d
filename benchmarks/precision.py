"""What drawing in 8 bits costs in quality: the model inside the package, with its tuned plans.

    python benchmarks/precision.py --data DIR --out FOLDER      writes FOLDER/precision.json; DIR holds Fashion-MNIST

The same 5,000 images, by seed, in each precision, against the test images. The same command goes on after any
interruption.
"""

import argparse
from pathlib import Path

from fpdm.experiments.experiment import REPORTING
from fpdm.experiments.points import Axes, Settings
from fpdm.experiments.sweep import all_points, run_sweep
from fpdm.files import write_json

MODEL, BUDGETS, IMAGES = "fashion-mnist", (24, 40, 80), 5000
PRECISIONS = ("float32", "int8", "float8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of Fashion-MNIST's four idx.gz files")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="points at a time (1)")
    options = parser.parse_args()
    rows, made_with = [], {}
    for dtype in PRECISIONS:
        folder = options.out / dtype
        settings = Settings(options.data, split="test", num_images=IMAGES, dtype=dtype, device="cpu")
        run_sweep([MODEL], Axes(BUDGETS, (), seeds=(REPORTING,), tuned=True), settings, folder, options.processes)
        for point in all_points(folder):
            measured = point["evaluation"]["measures"][0]
            row = {"dtype": dtype, "budget": point["budget"], **measured, "seconds": point["seconds"]}
            rows.append(row)
            made_with = point["made_with"]
    plain = {row["budget"]: row["value"] for row in rows if row["dtype"] == PRECISIONS[0]}
    rows = [{**row, "to float32": row["value"] / plain[row["budget"]]} for row in rows]
    write_json(options.out / "precision.json", {"rows": rows, "made_with": made_with})
    for row in rows:
        print(f"{row['dtype']:9} {row['budget']:4} passes  {row['name']} {row['value']:.4f}  {row['to float32']:.4f}")


if __name__ == "__main__":
    main()
