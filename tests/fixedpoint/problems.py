"""Problems whose solution is known, and functions that count."""

import torch

from fpdm.fixedpoint import FixedIterations, solve
from fpdm.models import FixedPointDiT
from tests.networks import SIZES, randomised


def spectral(radius, size=4):
    """A random matrix, not symmetric, of this spectral radius."""
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    return matrix * (radius / torch.linalg.eigvals(matrix).abs().max())


def linear(radius, size=4, dtype=torch.float32):
    matrix, b = spectral(radius, size).to(dtype), torch.arange(float(size), dtype=dtype)
    return lambda z, _: z @ matrix.T + b, torch.linalg.solve(torch.eye(size, dtype=dtype) - matrix, b)


def cosine():
    return lambda z, _: z.cos(), torch.full((4,), 0.7390851332151607)


def tanh_layer():
    matrix, solution = spectral(0.8), torch.tensor([0.5, -0.3, 0.1, -0.7])
    b = solution.atanh() - matrix @ solution
    return lambda z, _: (z @ matrix.T + b).tanh(), solution


def overshooting():
    return lambda z, _: -1.5 * z + 1, torch.full((4,), 0.4)


@torch.no_grad()
def core(samples=3):
    """The layer of a network and its contexts: f, start, context, solution."""
    model = randomised(FixedPointDiT(**SIZES))
    for parameter in model.core.parameters():
        parameter.mul_(0.6)  # with the full weights some samples have no fixed point that attracts
    draw = torch.Generator().manual_seed(1)
    u, c = torch.randn(samples, 4, 16, generator=draw), torch.randn(samples, 16, generator=draw)
    exact = model.double().core
    solution = solve(exact.step, u.double(), exact.prepare(u.double(), c.double()), stopping=FixedIterations(500))
    assert (solution.residuals[-1] < 1e-12).all()  # so the plain iteration contracts
    model.float()
    return model.core.step, u, model.core.prepare(u, c), solution.value.float()


def halving(z, context=None):
    """Solution 2. From 0 the iterates are 1, 3/2, 7/4; from 4 they are 3, 5/2, 9/4."""
    return z / 2 + 1


def sloped(z, slope):
    return slope * z + 1


class Counted:
    """A function that counts its evaluations, and the samples in them."""

    def __init__(self, f):
        self.f, self.calls, self.rows = f, 0, 0

    def __call__(self, z, context):
        self.calls, self.rows = self.calls + 1, self.rows + len(z)
        return self.f(z, context)
