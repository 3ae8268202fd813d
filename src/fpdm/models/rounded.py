"""Linear layers in 8 bits, for drawing: weights are rounded once, tokens as they come.

    x  (..., in)    x ~ r q,  r (..., 1) of each token, q numbers of 8 bits
    W  (out, in)    W ~ s p,  s (out,) of each output,  p numbers of 8 bits
    y  (..., out)   y = r s (q p^T) + b

Scales are of single tokens, so that an image does not depend on what is drawn beside it, but for rounding. Embeddings,
modulations, the injection of u and the final layer, which are no part of the iterations' cost, stay as they are, and so
does attention itself. `int8` and `float8` are the two formats.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fpdm.models.core import GatedCore, MlpCore
from fpdm.models.layers import Attention, Mlp

LAYERS = {
    Attention: ("qkv", "proj"),
    Mlp: ("fc1", "fc2"),
    MlpCore: ("inject_z", "inject_out"),
    GatedCore: ("inject_out",),
}


class RoundedLinear(nn.Module):
    """A linear layer for drawing, made from another one."""

    format: ClassVar[str]
    most: ClassVar[float]  # the largest number of the format

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach().float()
        # Neither parameters nor buffers: no conversion of a network's dtype may reach them.
        self.scale = (weight.abs().amax(1) / self.most).clamp_min(torch.finfo(torch.float32).tiny)
        self.weight = self.coded(weight / self.scale[:, None])
        self.bias = None if layer.bias is None else layer.bias.detach().clone()

    @abstractmethod
    def coded(self, values: Tensor) -> Tensor:
        """`values`, none beyond `most`, in the format."""

    def check(self, x: Tensor) -> None:
        """Raises ValueError where a gradient is wanted."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{self.format} layers have no gradient: train the network that they were made from")

    def scale_of(self, x: Tensor) -> Tensor:
        """Of each token (..., 1)."""
        return (x.abs().amax(-1, keepdim=True) / self.most).clamp_min(torch.finfo(x.dtype).tiny)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={len(self.weight)}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        kept = {"weight": self.weight, "scale": self.scale, "bias": self.bias}
        destination.update({prefix + name: value for name, value in kept.items() if value is not None})


def layers_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Those that are rounded: modules, and the names of layers in them."""
    return [(module, name) for module in model.modules() for name in LAYERS.get(type(module), ())]


def round_blocks(model: nn.Module, kind: type[RoundedLinear]) -> nn.Module:
    """The network, the linear layers of its blocks replaced by such of `kind`, in place. Raises ValueError if they are
    such already: what was rounded is not what should be rounded."""
    for module in model.modules():
        if isinstance(module, RoundedLinear):
            raise ValueError(
                f"the blocks of this network are in {module.format} already: convert the one that it was made from"
            )
    for module, name in layers_of(model):
        setattr(module, name, kind(getattr(module, name)))
    return model


def kinds_of_weights(model: nn.Module) -> set[tuple[str, torch.dtype]]:
    """On what kinds of devices, and in which precisions."""
    return {(p.device.type, p.dtype) for p in model.parameters()}
