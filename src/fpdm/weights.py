"""What makes a network the one it is."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn


def digest(model: nn.Module) -> str:
    """The SHA-256 of a network's weights: a model that moved is the same, one that was trained on is another."""
    sha = hashlib.sha256()
    for name, weight in model.state_dict().items():
        sha.update(name.encode())
        sha.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def check_whole(model: nn.Module, what: str) -> None:
    """Raises ValueError, saying `what`, if some weights were not in the files that diffusers opened `model` from."""
    if missing := [name for name, weight in model.state_dict().items() if weight.is_meta]:
        raise ValueError(f"{what}: {len(missing)} weights are missing, such as {missing[0]}")


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file that `torch.save` wrote; nothing but tensors is ever unpickled.

    Raises ValueError for a file that is missing, damaged, or holds anything else.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"the weights {path} cannot be used: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can raise anything, KeyError and struct.error among them
        raise ValueError(f"the weights {path} cannot be used: it is damaged, or not a file of tensors alone") from error
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ValueError(f"the weights {path} cannot be used: it holds other things than tensors by name")
    return weights


def fill(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Put weights read from `path` into `model`. Raises ValueError unless they are exactly its own."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights {path} cannot be used: they are of another network. {reason}") from error
