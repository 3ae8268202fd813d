"""Blocks in float8, on GPUs that multiply it (Ada, Hopper and later): q and p have 4 bits of exponent and 3 of mantissa
(e4m3), and their product is summed in float32 and returned in bfloat16. See `rounded`.

A CPU does the same arithmetic, slowly: there one can see what it costs in quality.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fpdm.models.rounded import RoundedLinear, kinds_of_weights, layers_of, round_blocks

FLOAT8 = torch.float8_e4m3fn
STEP = 16  # sizes of layers are multiples of this


class Float8Linear(RoundedLinear):
    """Tokens to such of the same precision, on the device of the layer that it was made from."""

    format, most = "float8", torch.finfo(FLOAT8).max

    def coded(self, values: Tensor) -> Tensor:
        return values.to(FLOAT8)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        tokens = x.flatten(0, -2).float()
        r = self.scale_of(tokens)
        q = (tokens / r).to(FLOAT8)
        y = torch._scaled_mm(q, self.weight.t(), r, self.scale[None], out_dtype=torch.bfloat16)
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def check(self, x: Tensor) -> None:
        super().check(x)
        if x.device != self.weight.device:
            raise ValueError(
                f"these float8 layers are on {self.weight.device}, not on {x.device}: convert after moving"
            )

    def __getstate__(self) -> dict[str, Any]:  # torch pickles no float8
        return {**super().__getstate__(), "weight": self.weight.view(torch.uint8)}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "weight": state["weight"].view(FLOAT8)})


def to_float8(model: nn.Module) -> nn.Module:
    """Put the blocks of a network into 8 bits of floating point, in place, on its device; the network. For drawing
    only: it can be neither trained nor saved then.

    Raises ValueError on a device that cannot multiply so, or for layers whose sizes are no multiples of 16.
    """
    for device in sorted({device for device, _ in kinds_of_weights(model)}):
        if missing := float8_missing(device):
            raise ValueError(f"float8 needs a GPU of compute capability 8.9 or more, and {missing}")
    shapes = {tuple(getattr(module, name).weight.shape) for module, name in layers_of(model)}
    if odd := {shape for shape in shapes if any(size % STEP for size in shape)}:
        raise ValueError(f"float8 multiplies layers whose sizes are multiples of {STEP}, not {min(odd)}: try int8")
    return round_blocks(model, Float8Linear)


@cache
def float8_missing(device: str) -> str:
    """What a kind of device lacks for products in float8; empty for nothing."""
    try:
        q, one = torch.zeros(STEP, STEP, device=device).to(FLOAT8), torch.ones(STEP, 1, device=device)
        torch._scaled_mm(q, q.t(), one, one.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, TypeError) as error:
        return f"{device} says: {str(error).splitlines()[0]}"
    return ""
