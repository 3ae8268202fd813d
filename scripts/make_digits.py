"""Write src/fpdm/data/digits.npz from scikit-learn's copy of the digits (run once; the result is in the package)."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

SOURCE = (
    "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998, "
    "doi:10.24432/C50P49; the 1,797 images that scikit-learn carries as load_digits"
)
LICENCE = "Creative Commons Attribution 4.0 International (CC BY 4.0)"

digits = load_digits()
np.savez_compressed(
    Path(__file__).parent.parent / "src/fpdm/data/digits.npz",
    images=digits.images.astype(np.uint8),  # 8 x 8, values 0 to 16
    labels=digits.target.astype(np.uint8),
    source=SOURCE,
    licence=LICENCE,
)
