"""Train the classifiers that the package carries, src/fpdm/evaluation/classifiers: of the digits, and of Fashion-MNIST.

  python scripts/make_classifiers.py --fashion-mnist DIR      the folder with the four IDX files

They are carried so that distances measured on different machines can be compared: a classifier trained elsewhere has
other features.
"""

import argparse
from pathlib import Path

from fpdm.data import digits, open_images
from fpdm.evaluation import Classifier

FOLDER = Path(__file__).parents[1] / "src/fpdm/evaluation/classifiers"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--fashion-mnist", required=True, metavar="DIR")
fashion_mnist = open_images(parser.parse_args().fashion_mnist)

for name, source, size in (("digits", digits(), 8), ("fashion_mnist", fashion_mnist, 28)):
    classifier = Classifier.train(source, size, "cpu")
    path = FOLDER / f"{name}.safetensors"
    classifier.save(path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB, {classifier.header}")
