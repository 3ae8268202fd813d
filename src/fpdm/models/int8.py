"""Blocks in int8, on CPUs: q and p are integers from -127 to 127, and their product's sum is exact. See `rounded`."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fpdm.models.rounded import RoundedLinear, kinds_of_weights, round_blocks

# Tokens travel as q + 128, since products of unsigned with signed integers are what CPUs have instructions for.
ZERO = 128


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


class Int8Linear(RoundedLinear):
    """Float32 tokens on the CPU to such."""

    format, most = "int8", 127

    def __init__(self, layer: nn.Linear):
        super().__init__(layer)
        self.packed = BACKEND.pack(self.weight)

    def coded(self, values: Tensor) -> Tensor:
        return values.round().to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        r = self.scale_of(x)
        q = torch.addcmul(x.new_full((), ZERO + 0.5), x, 1 / r).to(torch.uint8)  # which cuts off: rounded
        y = int8_product(q, self.packed, self.scale) if torch.compiler.is_compiling() else self._product(q)
        return y * r if self.bias is None else torch.addcmul(self.bias, y, r)

    def check(self, x: Tensor) -> None:
        super().check(x)
        if x.device.type != "cpu" or x.dtype != torch.float32:
            raise ValueError(f"int8 layers take float32 on the CPU, not {x.dtype} on {x.device}: convert after moving")

    def _product(self, q: Tensor) -> Tensor:
        return BACKEND.product(q, self.packed, self.scale)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "packed"}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = BACKEND.pack(self.weight)


def to_int8(model: nn.Module) -> nn.Module:
    """Put the blocks of a network, float32 and on the CPU, into 8 bits, in place; the network. For drawing only: it can
    be neither trained nor saved then.

    Raises ValueError on a machine that cannot multiply so, or for a network elsewhere or of another precision.
    """
    if missing := BACKEND.missing():
        raise ValueError(f"int8 needs AVX-512 VNNI and oneDNN, and {missing}: leave the weights in float32")
    if others := kinds_of_weights(model) - {("cpu", torch.float32)}:
        device, dtype = min(others, key=str)
        raise ValueError(
            f"int8 is made from float32 on the CPU, not from {dtype} on {device}: move it to the CPU before"
        )
    return round_blocks(model, Int8Linear)
