"""Inception-v3 as FID defines it."""

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from fpdm.names import needs
from fpdm.weights import digest, load_tensors

SHA256 = "6726825d"  # how that of the weights' file begins; it is in the file's name


class Inception:
    """The 2,048 pooled features of Inception-v3 (Heusel et al. 2017), as torch-fidelity computes them: the weights of
    TensorFlow's network of 2015-12-05, its resizing to 299 included. Only distances of these may be called FID.

    weights  a file of those weights; None lets torch-fidelity fetch them. Distances by others are called FD-Inception
    """

    name, distance, channels = "inception", "FID", (3,)

    def __init__(self, weights: str | None = None, device: str = "cpu"):
        needs("torchvision", "fid")
        needs("torch_fidelity", "fid")
        from torch_fidelity import FeatureExtractorInceptionV3

        if weights is not None:
            load_tensors(weights)  # refuses anything else: torch-fidelity would run what a pickle says
            if not hashlib.sha256(Path(weights).read_bytes()).hexdigest().startswith(SHA256):
                self.distance = "FD-Inception"
        try:
            self.model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
        except (OSError, RuntimeError) as error:  # no network, no such file, other weights
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"Inception-v3's weights cannot be had ({reason}): name the file with --weights, "
                "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases"
            ) from error
        self.model.to(device)
        self.device = device
        self.identity: dict[str, Any] = {
            "network": self.name,
            "weights": digest(self.model),
            "preprocessing": "bilinear to 299, as TensorFlow 1",
        }

    def features(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.device))[0]
