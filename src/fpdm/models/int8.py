"""Linear layers in 8 bits, for drawing on CPUs: weights are rounded once, tokens as they come.

    x  (..., in)    float32    x ~ r q,  r (..., 1) of each token, q integers from -127 to 127
    W  (out, in)    float32    W ~ s p,  s (out,) of each output,  p integers from -127 to 127
    y  (..., out)   float32    y = r s (q p^T) + b, the sum in integers, which is exact

Scales are of single tokens, so that an image does not depend on what is drawn beside it, but for rounding. Embeddings,
modulations, the injection of u and the final layer, which are no part of the iterations' cost, stay as they are, and so
does attention itself.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fpdm.models.fixed_point_dit import FixedPointCore
from fpdm.models.layers import Attention, Mlp

MOST = 127
# Tokens travel as q + 128, since products of unsigned with signed integers are what CPUs have instructions for.
ZERO = 128
LAYERS = {Attention: ("qkv", "proj"), Mlp: ("fc1", "fc2"), FixedPointCore: ("inject_z", "inject_out")}


class Backend(Protocol):
    """Who multiplies integers. There is one; torch's quantisation is moving, so nobody else knows its names."""

    def missing(self) -> str:
        """What this machine lacks for it; empty for nothing."""

    def pack(self, weight: Tensor) -> Tensor:
        """`weight` (out, in) int8 as `product` wants it."""

    def product(self, q: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        """scale (q - 128) p^T (..., out) float32, of `q` (..., in) uint8 and scales (out,)."""


class OneDNN:
    """Intel's library, which torch is built with, by the instructions of AVX-512 VNNI."""

    def missing(self) -> str:
        if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
            return "this build of torch has no oneDNN"
        return "" if torch.cpu._is_vnni_supported() else "this CPU has no AVX-512 VNNI instructions"

    def pack(self, weight: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_prepack(weight, None)  # type: ignore[no-any-return]

    def product(self, q: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        zeros = torch.zeros(len(scale), dtype=torch.int32)
        after: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, output as it is
        return torch.ops.onednn.qlinear_pointwise(q, 1.0, ZERO, packed, scale, zeros, *after)  # type: ignore[no-any-return]


BACKEND: Backend = OneDNN()


@torch.library.custom_op("fpdm::int8_linear", mutates_args=())
def int8_product(q: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """The backend's product, into which torch.compile does not look."""
    return BACKEND.product(q, packed, scale)


@int8_product.register_fake
def _(q: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-1], scale.shape[0]), dtype=torch.float32)


class Int8Linear(nn.Module):
    """A linear layer for drawing, made from a float32 one on the CPU."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach()
        scale = (weight.abs().amax(1) / MOST).clamp_min(torch.finfo(torch.float32).tiny)
        # Neither parameters nor buffers: no conversion of a network's dtype may reach them.
        self.weight = (weight / scale[:, None]).round().to(torch.int8)
        self.scale, self.packed = scale, BACKEND.pack(self.weight)
        self.bias = None if layer.bias is None else layer.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("int8 layers have no gradient: train the network that they were made from")
        if x.device.type != "cpu" or x.dtype != torch.float32:
            raise ValueError(f"int8 layers take float32 on the CPU, not {x.dtype} on {x.device}: convert after moving")
        r = (x.abs().amax(-1, keepdim=True) / MOST).clamp_min(torch.finfo(x.dtype).tiny)
        q = torch.addcmul(x.new_full((), ZERO + 0.5), x, 1 / r).to(torch.uint8)  # which cuts off: rounded
        y = int8_product(q, self.packed, self.scale) if torch.compiler.is_compiling() else self._product(q)
        return y * r if self.bias is None else torch.addcmul(self.bias, y, r)

    def _product(self, q: Tensor) -> Tensor:
        return BACKEND.product(q, self.packed, self.scale)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={len(self.weight)}, bias={self.bias is not None}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "packed"}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = BACKEND.pack(self.weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        kept = {"weight": self.weight, "scale": self.scale, "bias": self.bias}
        destination.update({prefix + name: value for name, value in kept.items() if value is not None})


def to_int8(model: nn.Module) -> nn.Module:
    """Put the blocks of a network, float32 and on the CPU, into 8 bits, in place; the network. For drawing only: it can
    be neither trained nor saved then.

    Raises ValueError on a machine that cannot multiply so, or for a network elsewhere or of another precision.
    """
    if missing := BACKEND.missing():
        raise ValueError(f"int8 needs AVX-512 VNNI and oneDNN, and {missing}: leave the weights in float32")
    others = {f"{p.dtype} on {p.device.type}" for p in model.parameters()} - {"torch.float32 on cpu"}
    if others:
        raise ValueError(f"int8 is made from float32 on the CPU, not from {min(others)}: move it to the CPU before")
    for module in list(model.modules()):
        for name in LAYERS.get(type(module), ()):
            setattr(module, name, Int8Linear(getattr(module, name)))
    return model
