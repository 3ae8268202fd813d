"""The lean functions equal the plain ones, forward and backward, and store less."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fpdm.fixedpoint.products import without_parameters
from fpdm.models.fused import gated, gelu, gelu_linear, linear, norm_linear

WIDTH, OUT = 8, 12


def inputs(dtype=torch.float64, batch=3, tokens=5):
    g = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(batch, tokens, WIDTH, generator=g, dtype=dtype) + 1
    shift, scale = torch.randn(2, batch, 1, WIDTH, generator=g, dtype=dtype)
    return x.requires_grad_(), shift.requires_grad_(), scale.requires_grad_()


def linear_layer(dtype=torch.float64, bias=True):
    torch.manual_seed(1)
    return nn.Linear(WIDTH, OUT, bias=bias, dtype=dtype)


def plain_norm_linear(x, shift, scale, layer):
    return layer(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def plain_linear(x, layer):
    return layer(x)


def plain_gelu_linear(x, layer):
    return layer(F.gelu(x, approximate="tanh"))


PAIRS = [
    pytest.param(norm_linear, plain_norm_linear, 3, id="norm_linear"),
    pytest.param(gelu_linear, plain_gelu_linear, 1, id="gelu_linear"),
    pytest.param(linear, plain_linear, 1, id="linear"),
]


def outcome(function, arguments, layer):
    """The value, and the gradients with respect to arguments and parameters of a weighted sum."""
    value = function(*arguments, layer)
    weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape).to(value.dtype)
    wanted = [t for t in (*arguments, *layer.parameters()) if t.requires_grad]
    return value.detach(), torch.autograd.grad((value * weights).sum(), wanted)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("lean", "plain", "count"), PAIRS)
def test_values_and_gradients_are_those_of_the_plain_functions(lean, plain, count, bias):
    arguments, layer = inputs()[:count], linear_layer(bias=bias)
    (value, gradients), (expected, wanted) = outcome(lean, arguments, layer), outcome(plain, arguments, layer)
    torch.testing.assert_close(value, expected)
    assert len(gradients) == count + 1 + bias
    for gradient, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize(("lean", "plain", "count"), PAIRS)
def test_derivatives_are_those_of_differences(lean, plain, count):
    arguments, layer = inputs(batch=2, tokens=3)[:count], linear_layer()
    assert torch.autograd.gradcheck(lambda *a: lean(*a[:count], layer), (*arguments, *layer.parameters()))


@pytest.mark.parametrize(("lean", "plain", "count"), PAIRS)
def test_what_needs_no_gradient_gets_none_and_the_others_the_same(lean, plain, count):
    """Each argument or parameter in turn."""
    for frozen in range(count + 2):
        arguments, layer = inputs()[:count], linear_layer()
        [*arguments, *layer.parameters()][frozen].requires_grad_(False)
        found, wanted = (outcome(function, arguments, layer)[1] for function in (lean, plain))
        for gradient, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lean", "plain", "count"), PAIRS)
def test_single_and_half_precision(lean, plain, count, dtype):
    arguments, layer = inputs(dtype)[:count], linear_layer(dtype)
    exact = outcome(plain, [t.detach().double().requires_grad_() for t in arguments], linear_layer().requires_grad_())
    layer.load_state_dict({name: value.to(dtype) for name, value in linear_layer().state_dict().items()})
    value, gradients = outcome(lean, arguments, layer)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
    for found, right in zip((value, *gradients), (exact[0], *exact[1]), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), right, **tolerance)


@pytest.mark.parametrize(("lean", "plain", "count"), PAIRS)
def test_under_autocast_gradients_of_parameters_are_float32(lean, plain, count):
    arguments, layer = inputs(torch.float32)[:count], linear_layer(torch.float32)
    found = []
    for function in (lean, plain):
        with torch.autocast("cpu", torch.bfloat16):
            value = function(*arguments, layer)
        assert value.dtype == torch.bfloat16
        found.append((value, *torch.autograd.grad(value.float().square().sum(), [*arguments, *layer.parameters()])))
    for gradient, right in zip(*found, strict=True):
        assert gradient.dtype == right.dtype
        assert F.cosine_similarity(gradient.flatten().float(), right.flatten().float(), dim=0) > 0.999


def test_without_gradient_gelu_is_the_tanh_form_far_out_too():
    x = torch.tensor([-1e30, -40.0, -9.0, -1.0, -1e-20, 0.0, 1e-20, 0.5, 3.0, 40.0, 1e30])
    with torch.no_grad():
        torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)
        assert gelu(torch.tensor([float("nan")])).isnan().all()
        y = x.clone()
        gelu(x)
        assert torch.equal(x, y)


def test_gates_add_to_what_they_are_given():
    x, gate, _ = inputs(torch.float32)
    branch = torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(gated(x, gate, branch), x + gate * branch)
    assert gated(x, gate.bfloat16(), branch.bfloat16()).dtype == torch.float32


class Adapted(nn.Linear):
    """As adapters are: more than its weights."""

    def forward(self, x):
        return 2 * super().forward(x)


def doubled_by_hook(layer):
    layer.register_forward_hook(lambda module, arguments, output: 2 * output)
    return layer


def doubled_in_place(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


@pytest.mark.parametrize(
    "change", [lambda _: Adapted(WIDTH, OUT, dtype=torch.float64), doubled_by_hook, doubled_in_place]
)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("lean", "plain", "count"), PAIRS)
def test_layers_that_are_more_than_their_weights_are_called(lean, plain, count, grad, change):
    arguments, layer = inputs()[:count], linear_layer()
    changed = change(linear_layer())
    changed.load_state_dict(layer.state_dict())
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(lean(*arguments, changed), 2 * plain(*arguments, layer))


def stored(run):
    """Numbers that autograd keeps, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(kept.values())


def test_neither_modulated_tokens_nor_activations_are_stored():
    x, shift, scale = inputs(batch=4, tokens=100)
    layer, tokens = linear_layer(), 4 * 100
    weights = sum(p.numel() for p in layer.parameters()) + shift.numel() + scale.numel()
    assert stored(lambda: norm_linear(x, shift, scale, layer)) <= tokens * (WIDTH + 2) + weights
    assert stored(lambda: gelu_linear(x, layer)) <= tokens * WIDTH + weights
    assert stored(lambda: plain_norm_linear(x, shift, scale, layer)) >= tokens * 3 * WIDTH
    assert stored(lambda: plain_gelu_linear(x, layer)) >= tokens * 2 * WIDTH


@pytest.mark.parametrize(("lean", "plain", "count"), PAIRS)
def test_products_with_the_jacobian_leave_parameters_out(lean, plain, count):
    arguments, layer = inputs()[:count], linear_layer()
    value = lean(*arguments, layer)
    with without_parameters():
        found = torch.autograd.grad(
            value.sum(), [*arguments, *layer.parameters()], retain_graph=True, allow_unused=True
        )
    assert all(gradient is not None for gradient in found[:count])
    assert all(gradient is None for gradient in found[count:])
    again = torch.autograd.grad(value.sum(), [*arguments, *layer.parameters()])
    for gradient, right in zip(again[:count], found[:count], strict=True):
        assert torch.equal(gradient, right)
    assert all(gradient is not None for gradient in again)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("lean", "plain", "count"), PAIRS)
def test_second_derivatives_are_those_of_differences(lean, plain, count, bias):
    arguments, layer = inputs(batch=2, tokens=3)[:count], linear_layer(bias=bias)
    assert torch.autograd.gradgradcheck(lambda *a: lean(*a[:count], layer), (*arguments, *layer.parameters()))


@pytest.mark.parametrize(("lean", "plain", "count"), PAIRS)
def test_under_autocast_second_derivatives_are_near(lean, plain, count):
    arguments, layer = inputs(torch.float32)[:count], linear_layer(torch.float32)
    found = []
    for function in (lean, plain):
        with torch.autocast("cpu", torch.bfloat16):
            value = function(*arguments, layer).float().square().mean()
        (gradient,) = torch.autograd.grad(value, arguments[0], create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), layer.weight)[0])
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=0.1, atol=0.05 * float(found[1].abs().max()))


def test_without_gradient_products_of_float32_are_the_same_and_counted(monkeypatch):
    x, layer = torch.randn(2, 3, WIDTH), linear_layer(torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.testing.assert_close(linear(x, layer), layer(x), rtol=1e-5, atol=1e-6)
    assert counter.get_total_flops() == 2 * (2 * x.numel() * OUT)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.no_grad():
        assert torch.equal(linear(x, layer), layer(x))
        assert linear(x[:0], layer).shape == (0, 3, OUT)
