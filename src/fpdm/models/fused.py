"""What transformer blocks are made of, with fewer passes over memory and less kept for the backward pass.

    x                    tokens (B, N, D)
    shift, scale, gate   (B, 1, D)

Each function equals a few plain ones of `torch.nn.functional`. Their backward passes compute again, element by element,
what those would have stored: normalised and modulated tokens, and the activations of an MLP. Second derivatives are
those of the plain ones.

A layer that is more than a plain `nn.Linear` (quantised, adapted as by LoRA, hooked) is called as it is. So are all of
them, where there are gradients, while torch.compile traces, which fuses in its own way, and under torch.func.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpdm.fixedpoint import is_transformed, only_of_inputs
from fpdm.models.products import is_for_onednn, product

EPS = 1e-6
# GELU's tanh form is x sigmoid(x (SLOPE + CUBIC x^2)), as tanh(v) = 2 sigmoid(2 v) - 1. On a CPU torch's sigmoid takes
# a sixth of the time of its tanh.
SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * SLOPE


def norm_linear(x: Tensor, shift: Tensor, scale: Tensor, layer: nn.Module) -> Tensor:
    """`layer` of the normalised and modulated tokens, LayerNorm(x) (1 + scale) + shift."""
    if has_own_backward(layer):
        return _NormLinear.apply(x, shift, scale, layer.weight, layer.bias)  # type: ignore[no-any-return]
    return linear(normalised(x, shift, scale), layer)


def gelu_linear(x: Tensor, layer: nn.Module) -> Tensor:
    """`layer` of GELU(x), in its tanh form."""
    if has_own_backward(layer):
        return _GeluLinear.apply(x, layer.weight, layer.bias)  # type: ignore[no-any-return]
    return linear(gelu(x), layer)


def mlp(x: Tensor, shift: Tensor, scale: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    """`second` of GELU of `first` of the normalised and modulated tokens."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_plain(first):
        return gelu_linear(norm_linear(x, shift, scale, first), second)
    tokens = normalised(x, shift, scale)
    if not is_for_onednn(tokens, first.weight):  # type: ignore[arg-type]
        return gelu_linear(linear(tokens, first), second)
    return linear(product(tokens, first.weight, first.bias, gelu=True), second)  # type: ignore[arg-type]


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """`layer` of x."""
    if has_own_backward(layer):
        return _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() or not is_plain(layer):
        return layer(x)  # type: ignore[no-any-return]
    return product(x, layer.weight, layer.bias)  # type: ignore[arg-type]


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate branch, as precise as x."""
    return torch.addcmul(x, gate.to(x.dtype), branch.to(x.dtype))


def normalised(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift."""
    return modulated(F.layer_norm(x, x.shape[-1:], eps=EPS), shift, scale)


def modulated(normalised: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normalised (1 + scale) + shift, as precise as what is normalised."""
    dtype = normalised.dtype
    return torch.addcmul(shift.to(dtype), normalised, 1 + scale.to(dtype))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    if torch.compiler.is_compiling() and tanh_is_slow(x):
        return x * torch.sigmoid(x * (SLOPE + CUBIC * x * x))
    if torch.is_grad_enabled() or not tanh_is_slow(x):
        return F.gelu(x, approximate="tanh")
    return _gate_of(x).mul_(x)


def has_own_backward(layer: nn.Module) -> bool:
    """Whether a gradient is wanted that the functions below may compute."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed() and is_plain(layer)


def is_plain(layer: nn.Module) -> bool:
    """Whether to call `layer` is to apply its weights, and nothing else."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)  # where accelerate puts its hooks
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
    )


def tanh_is_slow(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


Backward = Callable[[Any, Tensor], tuple[Tensor | None, ...]]


def once(inputs: int, plain: Callable[..., Tensor]) -> Callable[[Backward], Backward]:
    """For a backward pass that records nothing. Where its own derivative is wanted (`create_graph=True`), torch's own
    of `plain` takes its place, a function of the arguments, which are the first tensors saved."""

    def of(backward: Backward) -> Backward:
        @wraps(backward)
        def call(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, grad)
            needed = wanted(ctx, inputs)
            # Tensors apart: one argument may come from another, as tokens do from earlier iterations' modulation.
            arguments = [None if saved is None else saved.view_as(saved) for saved in ctx.saved_tensors[: len(needed)]]
            chosen = [argument for argument, need in zip(arguments, needed, strict=True) if need]
            result = plain(*arguments)
            found = iter(torch.autograd.grad(result, chosen, grad.to(result.dtype), create_graph=True))  # type: ignore[arg-type]
            return tuple(next(found) if need else None for need in needed)

        return call

    return of


class _Linear(torch.autograd.Function):
    """torch's own, but for `product`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return product(x, weight, bias)

    @staticmethod
    @once(1, F.linear)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        for_x, for_weight, for_bias = wanted(ctx, inputs=1)
        of_weight = _of_weight(grad, x, weight) if for_weight else None
        of_bias = _of_bias(grad, bias) if for_bias else None
        of_x = product(grad, weight.to(grad.dtype).t()).to(x.dtype) if for_x else None
        return of_x, of_weight, of_bias


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        normalised, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
        ctx.save_for_backward(x, shift, scale, weight, bias, mean, rstd)
        return product(modulated(normalised, shift, scale), weight, bias)

    @staticmethod
    @once(3, lambda x, shift, scale, weight, bias: F.linear(normalised(x, shift, scale), weight, bias))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, weight, bias, mean, rstd = ctx.saved_tensors
        for_x, for_shift, for_scale, for_weight, for_bias = wanted(ctx, inputs=3)
        normalised = (x - mean).mul_(rstd).to(x.dtype)
        of_weight = _of_weight(grad, modulated(normalised, shift, scale), weight) if for_weight else None
        of_bias = _of_bias(grad, bias) if for_bias else None
        inner = product(grad, weight.to(grad.dtype).t()).to(x.dtype)
        of_shift = inner.sum(1, keepdim=True).to(shift.dtype) if for_shift else None
        of_scale = (inner * normalised).sum(1, keepdim=True).to(scale.dtype) if for_scale else None
        of_x = _of_normalised(inner.mul_(1 + scale.to(x.dtype)), x, mean, rstd) if for_x else None
        return of_x, of_shift, of_scale, of_weight, of_bias


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return product(gelu(x), weight, bias)

    @staticmethod
    @once(1, lambda x, weight, bias: F.linear(gelu(x), weight, bias))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        for_x, for_weight, for_bias = wanted(ctx, inputs=1)
        slope = None
        if tanh_is_slow(x):
            gate = _gate_of(x)
            activation = gate * x
            slope = _slope(x, gate, activation) if for_x else None
            del gate  # this is where a step's memory is at its peak
        else:
            activation = gelu(x)
        of_weight = _of_weight(grad, activation, weight) if for_weight else None
        del activation
        of_bias = _of_bias(grad, bias) if for_bias else None
        of_x = None
        if for_x:
            of_x = product(grad, weight.to(grad.dtype).t()).to(x.dtype)
            of_x = _of_gelu(of_x, x) if slope is None else of_x.mul_(slope)
        return of_x, of_weight, of_bias


def wanted(ctx: Any, inputs: int) -> list[bool]:
    """Of which arguments gradients are to be computed; the first ones are inputs, the others parameters."""
    return [need and (i < inputs or not only_of_inputs()) for i, need in enumerate(ctx.needs_input_grad)]


def _gate_of(x: Tensor) -> Tensor:
    """What GELU(x) is x times of."""
    return torch.addcmul(x.new_full((), SLOPE), x, x, value=CUBIC).mul_(x).sigmoid_()


def _slope(x: Tensor, gate: Tensor, activation: Tensor) -> Tensor:
    """GELU'(x) = gate + x gate (1 - gate) (SLOPE + 3 CUBIC x^2). `activation` is x gate."""
    slope = torch.addcmul(x.new_full((), SLOPE), x, x, value=3 * CUBIC).mul_(activation)
    return slope.addcmul_(slope, gate, value=-1).add_(gate)


def _of_gelu(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]


def _of_normalised(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    mask = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, None, None, mask)[0]  # type: ignore[no-any-return]


def _of_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """grad^T x. It is not `@`, which on a CPU is the slower library's."""
    return product(grad.flatten(0, -2).t(), x.flatten(0, -2).to(grad.dtype).t()).to(weight.dtype)


def _of_bias(grad: Tensor, bias: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0).to(bias.dtype)
