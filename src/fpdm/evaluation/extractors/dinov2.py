"""DINOv2: features of a network trained without labels, which agree better with what people see than Inception's."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fpdm.evaluation.extractors.images import resized
from fpdm.names import needs
from fpdm.weights import digest

SIDE = 224
WIDTH = 1024  # of ViT-L, by whose features FD-DINOv2 is defined
HUB = "facebook/dinov2-large"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels


class DINOv2:
    """The class token of DINOv2 ViT-L/14 after the last norm (Oquab et al. 2023), as Stein et al. 2023 compare by.

    weights  None for facebook/dinov2-large, or a folder or a name on the hub of another size

    Images are resized to 224 (bicubic, antialiased) and normalised as ImageNet's.
    """

    name, distance, channels = "dinov2", "FD-DINOv2", (3,)

    def __init__(self, weights: str | None = None, device: str = "cpu"):
        needs("transformers", "dinov2")
        from transformers import Dinov2Model

        try:
            if weights is not None and weights[0] in "./~" and not Path(weights).is_dir():
                raise ValueError(f"there is no folder {weights}")
            self.model, info = Dinov2Model.from_pretrained(
                weights or HUB, use_safetensors=True, output_loading_info=True
            )
            if lacking := set(info["missing_keys"]) - {"embeddings.mask_token"}:  # which only its training uses
                raise ValueError(f"weights are missing: {', '.join(sorted(lacking)[:3])}")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"DINOv2 cannot be opened ({reason}): name a folder of it with --weights") from error
        self.model.requires_grad_(False).eval().to(device)
        self.device = device
        if (width := self.model.config.hidden_size) != WIDTH:
            self.distance = f"FD-DINOv2 ({width} wide)"
        self.identity: dict[str, Any] = {
            "network": f"dinov2, {self.model.config.num_hidden_layers} layers, {self.model.config.hidden_size} wide",
            "weights": digest(self.model),
            "preprocessing": "bicubic antialiased to 224",
        }

    def features(self, images: Tensor) -> Tensor:
        x = resized(images.to(self.device), SIDE, "bicubic") / 255
        mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
        return self.model(pixel_values=(x - mean) / std).pooler_output
