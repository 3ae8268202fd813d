"""What makes a network the one it is."""

import hashlib

import torch
from torch import nn


def digest(model: nn.Module) -> str:
    """The SHA-256 of a network's weights: a model that moved is the same, one that was trained on is another."""
    sha = hashlib.sha256()
    for name, weight in model.state_dict().items():
        sha.update(name.encode())
        sha.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
