"""Networks so small that a test can afford many, and whose weights make a difference."""

import torch

SIZES = {"sample_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "num_heads": 2, "num_classes": 3}


def randomised(model):
    """Fresh networks predict 0, and their zero gates make every block the identity: nothing could be told apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model.eval()
