"""Problems whose solution is known, and functions that count."""

from copy import deepcopy
from functools import lru_cache
from statistics import mean

import torch

from fpdm.data import digits
from fpdm.diffusion import DiffusionLoss, make_schedule
from fpdm.fixedpoint import FixedIterations, Solve, StochasticJacobianFree, relative_residual, solve
from fpdm.fixedpoint.trees import mapped
from fpdm.keyed import generator
from fpdm.models import FixedPointDiT
from tests.networks import SIZES, randomised

TIMESTEPS = (1, 100, 300, 500, 700, 900, 990)


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
    solution = solve(exact, u.double(), exact.prepare(u.double(), c.double()), stopping=FixedIterations(500))
    assert (solution.residuals[-1] < 1e-12).all()  # so the plain iteration contracts
    model.float()
    return model.core, u, model.core.prepare(u, c), solution.value.float()


@lru_cache
def trained():
    """A network after four seconds of training on digits; and of two noisy digits at each of `TIMESTEPS`, where its
    iteration starts and the context."""
    source, draw, losses = digits(), generator("trained"), []
    images, labels = torch.from_numpy(source.images)[:, None] / 127.5 - 1, torch.from_numpy(source.labels).long()
    loss = DiffusionLoss(make_schedule(prediction_type="v_prediction", learned_variance=False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FixedPointDiT(**{**SIZES, "hidden_size": 32, "num_classes": 10, "learned_variance": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(250):
        rows, t = torch.randint(len(images), (32,), generator=draw), torch.randint(1000, (32,), generator=draw)
        x0, noise = images[rows], torch.randn(32, 1, 8, 8, generator=draw)
        gradient = StochasticJacobianFree((0, 6), (1, 6)).draw(draw)
        found = model(loss.noisy(x0, noise, t), t, labels[rows], solve=Solve(gradient=gradient))
        value = loss(found.sample, x0, noise, t).total.mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert mean(losses[-25:]) < 0.75 * mean(losses[:25])  # from 0.69 to 0.40

    model.eval().requires_grad_(False)
    t, given = torch.tensor(TIMESTEPS).repeat_interleave(2), []
    x = loss.noisy(images[: len(t)], torch.randn(len(t), 1, 8, 8, generator=draw), t)

    def seen(f, z, context):
        given.extend([z, context])
        return Solve()(f, z, context)

    model(x, t, labels[: len(t)], solve=seen)
    return model, *given


def trained_layer(dtype=torch.float32, feedback=1.0):
    """f, start and context in `trained`; `feedback` multiplies what the iterate adds to its own next value."""
    model, start, context = trained()
    layer = deepcopy(model.core).to(dtype)
    layer.inject_z.weight *= feedback
    return layer, start.to(dtype), mapped(lambda tensor: tensor.to(dtype), context)


@lru_cache
def trained_solution():
    f, start, context = trained_layer(torch.float64)
    solution = solve(f, start, context, stopping=FixedIterations(400)).value
    assert (relative_residual(solution, f(solution, context)) < 1e-10).all()
    return solution


def trained_core(dtype=torch.float32):
    """The layer of a trained network and its contexts: f, start, context, solution."""
    return *trained_layer(dtype), trained_solution().to(torch.promote_types(dtype, torch.float32))


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
