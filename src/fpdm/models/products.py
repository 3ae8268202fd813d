"""Products of tokens with weights, by whichever library is the fastest at them.

    x       (..., in)
    weight  (out, in)

On a CPU products in float32 are oneDNN's, which is faster there than the BLAS that torch takes for them
(docs/performance.md). No gradient is recorded by anything here: that is the callers' part.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fpdm.fixedpoint import is_transformed

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # from torch 2.7 on


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x W^T + b, or GELU of that in its tanh form; `gelu` is for where `is_for_onednn` only."""
    if torch.compiler.is_compiling():  # which cannot ask what there is
        opaque = is_single_on_cpu(x, weight) and not is_exporting()
        return opaque_product(x, weight, bias) if opaque else F.linear(x, weight, bias)
    if not is_for_onednn(x, weight):
        assert not gelu
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias, gelu)


def is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is oneDNN's."""
    return (
        is_single_on_cpu(x, weight)
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)  # type: ignore[attr-defined]
        and x.numel() > 0
        and not is_transformed()  # which drops tangents there, and knows no batches
    )


def is_single_on_cpu(x: Tensor, weight: Tensor) -> bool:
    is_single = x.dtype == weight.dtype == torch.float32
    return is_single and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    after: tuple[Any, ...] = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *after)  # type: ignore[no-any-return]


@torch.library.custom_op("fpdm::linear", mutates_args=())
def opaque_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`product` for torch.compile, whose own lowering of oneDNN's wants weights that are constants."""
    return _onednn(x, weight, bias) if is_for_onednn(x, weight) else F.linear(x, weight, bias)


@opaque_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def operations(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of a product of tensors of these shapes."""
    return 2 * math.prod(x) * weight[0]


register_flop_formula(torch.ops.fpdm.linear)(operations)
if torch.backends.mkldnn.is_available():  # not in every build
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(operations)  # which torch's counter does not know
