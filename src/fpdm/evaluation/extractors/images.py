"""What networks trained on photographs want of images."""

import torch.nn.functional as F
from torch import Tensor


def resized(images: Tensor, side: int, mode: str) -> Tensor:
    """Images (B, C, H, W) uint8 as (B, C, side, side) float32 in [0, 255], antialiased where they shrink."""
    x = images.float()
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode=mode, align_corners=False, antialias=True).clamp(0, 255)
