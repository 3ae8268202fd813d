"""The implicit gradient and the phantom one, against closed forms and against unrolling to convergence in float64."""

import pytest
import torch

from fpdm.fixedpoint import (
    Anderson,
    Broyden,
    FixedIterations,
    Implicit,
    JacobianFree,
    Phantom,
    Picard,
    Solve,
    Tolerance,
    Unroll,
)
from tests.fixedpoint.test_gradients import SIZE, Linear, saved_bytes
from tests.networks import SIZES, randomised

BACKWARD = [Picard(), Picard(0.7), Anderson(), Anderson(4), Broyden()]
EXACT = {"tolerance": 1e-12, "max_iterations": 300}


def true_gradients(problem):
    with torch.no_grad():
        inverse = torch.linalg.inv(torch.eye(SIZE) - problem.a)
        cotangent, solution = problem.v @ inverse, problem.c @ problem.w.T @ inverse.T
        return cotangent.T @ solution, cotangent.T @ problem.c, cotangent @ problem.w


def cosine(found, wanted):
    a, b = (torch.cat([x.flatten() for x in part]).double() for part in (found, wanted))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("solver", BACKWARD)
def test_implicit_is_the_closed_form_of_a_linear_contraction(solver):
    problem = Linear()
    found = problem.gradients(problem.solution(Implicit(solver, **EXACT), 200), allow_unused=True)
    torch.testing.assert_close(found[:3], true_gradients(problem), rtol=1e-6, atol=1e-8)
    assert found[3] is None


@pytest.mark.parametrize("forward", [Picard(), Picard(0.5), Anderson(), Broyden()])
def test_the_solver_of_the_forward_pass_does_not_scale_the_gradient(forward):
    problem = Linear()
    solve = Solve(stopping=FixedIterations(120), solver=forward, gradient=Implicit(**EXACT))
    solution = solve(problem.f, problem.z0, problem.c @ problem.w.T)
    found = problem.gradients(solution, allow_unused=True)[:3]
    torch.testing.assert_close(found, true_gradients(problem), rtol=1e-6, atol=1e-8)


def trained_like(**changes):
    """A network whose core contracts, and a batch for it, in float64."""
    from fpdm.models import FixedPointDiT

    model = randomised(FixedPointDiT(**{**SIZES, **changes})).double()
    with torch.no_grad():
        model.core.inject_z.weight *= 0.15
    draw = torch.Generator().manual_seed(1)
    return model, torch.randn(3, 1, 8, 8, generator=draw).double(), torch.tensor([0, 1, 2])


def gradients_of(gradient, stopping, **changes):
    model, x, y = trained_like(**changes)
    output = model(x, 300.0, y, solve=Solve(stopping=stopping, gradient=gradient)).sample
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("num_core", [1, 2])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()])
def test_implicit_is_unrolling_to_convergence_on_a_network(solver, num_core):
    unrolled = gradients_of(Unroll(150), FixedIterations(1), num_core=num_core)
    implicit = gradients_of(Implicit(solver, **EXACT), Tolerance(1e-13, 400), num_core=num_core)
    for a, b in zip(implicit, unrolled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max().clamp_min(1e-9)))


def test_the_more_of_the_series_the_nearer_to_the_true_gradient():
    true = gradients_of(Unroll(150), FixedIterations(1))
    settled = Tolerance(1e-13, 400)
    free = cosine(gradients_of(JacobianFree(), settled), true)
    phantom = [cosine(gradients_of(Phantom(steps, 0.6), settled), true) for steps in (1, 3, 9)]
    assert 0.5 < free < 0.9999
    assert phantom[0] == pytest.approx(free, abs=0.02)
    assert phantom[0] < phantom[1] < phantom[2]
    assert phantom[2] > 0.999


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_phantom_is_the_damped_series(steps, damping):
    problem = Linear()
    solve = Solve(stopping=FixedIterations(200), solver=Anderson(), gradient=Phantom(steps, damping))
    found = problem.gradients(solve(problem.f, problem.z0, problem.c @ problem.w.T), allow_unused=True)
    with torch.no_grad():
        step = (1 - damping) * torch.eye(SIZE) + damping * problem.a
        terms = sum(damping * problem.v @ torch.linalg.matrix_power(step, i) for i in range(steps))
    torch.testing.assert_close(found[2], terms @ problem.w, rtol=1e-6, atol=1e-8)
    assert found[3] is None


def test_samples_of_the_backward_system_are_independent():
    """One whose system does not contract leaves the gradient of the others as it is alone."""
    slopes = torch.tensor([[0.3], [0.9], [1.0]], dtype=torch.float64)
    together = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)

    def gradient(context, rows):
        z = torch.zeros(len(rows), 1, dtype=torch.float64)
        solve = Solve(stopping=FixedIterations(5), gradient=Implicit(Picard(), 1e-10, 50))
        solve(lambda z, c: z * c[1] + c[0], z, (context, slopes[rows])).value.sum().backward()
        return context.grad

    found = gradient(together, [0, 1, 2])
    assert found.isfinite().all()
    for row in (0, 1):
        alone = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
        assert gradient(alone, [row])[0] == found[row]
    assert found[0].item() == pytest.approx(1 / 0.7, rel=1e-8)


def test_implicit_stores_one_evaluation_whatever_it_iterates():
    def stored(gradient, n):
        model, x, y = trained_like()
        return saved_bytes(lambda: model(x, 300.0, y, solve=Solve(stopping=FixedIterations(n), gradient=gradient)))

    once = stored(JacobianFree(), 1)
    assert stored(Implicit(), 2) == stored(Implicit(), 40)
    assert stored(Implicit(), 40) <= once * 1.05
    assert stored(Unroll(6), 1) > 2 * once


def test_a_backward_pass_under_autocast_gives_every_parameter_a_gradient():
    from fpdm.models import FixedPointDiT

    model = randomised(FixedPointDiT(**SIZES))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.ones(2, 1, 8, 8), 10.0, solve=Solve(stopping=FixedIterations(8), gradient=Implicit()))
    output.sample.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("gradient", "most", "iterates"),
    [
        (Unroll(), 4, range(1, 5)),
        (Unroll(3), 4, range(1, 4)),
        (JacobianFree(), 4, range(5, 6)),
        (Phantom(3), 2, range(3, 6)),
        (Implicit(), 7, range(8, 9)),
    ],
)
def test_methods_tell_which_iterates_they_differentiate(gradient, most, iterates):
    assert gradient.differentiated(most) == iterates
    problem = Linear()
    solve = Solve(stopping=FixedIterations(most), gradient=gradient, exits=tuple(range(1, 12)))
    kept = solve(problem.f, problem.z0.detach(), problem.c @ problem.w.T).kept
    assert {k for k, z in kept.items() if z.requires_grad} == set(iterates)
    assert max(kept) == iterates[-1]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Unroll(0), "iterations must be an integer of at least 1"),
        (lambda: Phantom(0), "steps must be an integer of at least 1"),
        (lambda: Phantom(1, 1.5), "damping"),
        (lambda: Implicit(tolerance=0), "tolerance"),
        (lambda: Implicit(max_iterations=0), "max_iterations"),
    ],
)
def test_bad_settings_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_implicit_has_no_derivative_of_its_own():
    problem = Linear()
    value = problem.solution(Implicit(**EXACT), 200).value
    with pytest.raises(RuntimeError, match=r"the implicit gradient has no derivative \(create_graph=True\)"):
        torch.autograd.grad(value.sum(), problem.w, create_graph=True)
