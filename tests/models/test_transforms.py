"""Derivatives beyond the first, and what torch.func and torch.export make of a network: as of torch itself."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fpdm import DiT, FixedPointDiT
from fpdm.models import fused
from tests.networks import SIZES, randomised

T, Y = torch.tensor([500]), torch.tensor([1])
NETWORKS = [
    pytest.param(lambda: FixedPointDiT(**SIZES, num_core=2), {"iterations": 3}, id="fixed point"),
    pytest.param(lambda: DiT(**SIZES, depth=2), {}, id="explicit"),
]
DTYPES = [torch.float32, torch.float64]
pytestmark = [pytest.mark.parametrize(("make", "how"), NETWORKS), pytest.mark.parametrize("dtype", DTYPES)]


@pytest.fixture(autouse=True)
def derivatives_of_attention():
    """Only this kernel of torch's has all of them; the others say that they lack them."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def noise(dtype, batch=1):
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def network_and_loss(make, how, dtype):
    model = randomised(make()).to(dtype)

    def loss(x):
        return model(x, T.expand(len(x)), Y.expand(len(x)), **how).sample.square().mean()

    return model, loss


def same(found, wanted):
    scale = wanted.abs().max()
    assert scale > 1e-4, "or nothing is told apart"
    tolerance = 1e-4 if wanted.dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=tolerance)


def second(model, loss, dtype):
    """A product with the Hessian, and the gradients of a gradient penalty."""
    x = noise(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    penalty = torch.autograd.grad(gradient.square().sum(), list(model.parameters()), allow_unused=True)
    _, product = torch.autograd.functional.hvp(loss, x.detach(), torch.ones_like(x))
    return [product, *(torch.zeros(()).to(dtype) if found is None else found for found in penalty)]


def test_second_derivatives(make, how, dtype, monkeypatch):
    model, loss = network_and_loss(make, how, dtype)
    found = second(model, loss, dtype)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "has_own_backward", lambda layer: False)
        wanted = second(model, loss, dtype)
    assert sum(bool(values.any()) for values in found) > 10
    for values, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(values, right, rtol=1e-3, atol=1e-4 * float(wanted[0].abs().max()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # by which torch makes some of its own
@pytest.mark.parametrize("grad", [True, False])
def test_forward_derivatives(make, how, dtype, grad):
    model, _ = network_and_loss(make, how, dtype)
    x, along = noise(dtype, 2)[:1], noise(dtype, 2)[1:]

    def sample(x):
        return model(x, T, Y, **how).sample

    with torch.set_grad_enabled(grad):
        _, found = torch.func.jvp(sample, (x,), (along,))
    double, step = model.double(), 1e-6
    with torch.no_grad():
        ends = [double(x.double() + sign * step * along.double(), T, Y, **how).sample for sign in (1, -1)]
    wanted = (ends[0] - ends[1]) / (2 * step)
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


def test_gradients_by_transforms_and_of_single_samples(make, how, dtype):
    model, loss = network_and_loss(make, how, dtype)
    x = noise(dtype, 3)
    own = [torch.autograd.grad(loss(one), list(model.parameters())) for one in x.split(1)]

    def of(parameters, one):
        return torch.func.functional_call(model, parameters, (one[None], T, Y), how).sample.square().mean()

    parameters = dict(model.named_parameters())
    for number, found in enumerate(torch.func.grad(of)(parameters, x[1]).values()):
        torch.testing.assert_close(found, own[1][number], rtol=1e-3, atol=1e-5)
    for number, found in enumerate(torch.func.vmap(torch.func.grad(of), (None, 0))(parameters, x).values()):
        torch.testing.assert_close(found, torch.stack([some[number] for some in own]), rtol=1e-3, atol=1e-5)


def test_batches_by_transforms(make, how, dtype):
    model, _ = network_and_loss(make, how, dtype)
    x = noise(dtype, 3)
    with torch.no_grad():
        found = torch.func.vmap(lambda one: model(one[None], T, Y, **how).sample[0])(x)
        same(found, model(x, T.expand(3), Y.expand(3), **how).sample)


def test_exported(make, how, dtype):
    model, _ = network_and_loss(make, how, dtype)

    class Sample(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, t, y):
            return self.model(x, t, y, **how).sample

    x = noise(dtype)
    with torch.no_grad():
        exported = torch.export.export(Sample().eval(), (x, T, Y)).module()
        same(exported(x, T, Y), model(x, T, Y, **how).sample)
