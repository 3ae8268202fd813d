"""Every solver: known solutions, other implementations, independent samples, broken samples, precision."""

import math
import warnings
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from fpdm.fixedpoint import Anderson, Broyden, FixedIterations, Picard, Status, Tolerance, relative_residual, solve
from fpdm.fixedpoint.trees import mapped
from tests.fixedpoint.problems import (
    Counted,
    core,
    cosine,
    halving,
    linear,
    sloped,
    spectral,
    tanh_layer,
    trained_core,
    trained_layer,
)

ACCELERATED = [Anderson(1), Anderson(2), Anderson(5), Anderson(5, damping=0.7), Broyden(8)]
SOLVERS = [Picard(), Picard(0.7), *ACCELERATED]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)
every_accelerated = pytest.mark.parametrize("solver", ACCELERATED, ids=str)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def from_noise(problem):
    f, solution = problem
    return f, normal(3, *solution.shape, dtype=solution.dtype), None, solution.expand(3, *solution.shape)


def errors(value, solution):
    """Relative, of each sample."""
    return (value - solution).flatten(1).norm(dim=1) / solution.flatten(1).norm(dim=1)


class Recorded:
    """A function that remembers what it was given and what it gave."""

    def __init__(self, f):
        self.f, self.inputs, self.outputs = f, [], []

    def __call__(self, z, context):
        self.inputs.append(z.clone())  # torchdeq hands over views of what it writes to later
        self.outputs.append(self.f(z, context))
        return self.outputs[-1]


# --- known solutions


@every_solver
@pytest.mark.parametrize("problem", [
    pytest.param(lambda: from_noise(linear(0.3)),    id="linear of radius 0.3"),
    pytest.param(lambda: from_noise(linear(0.9)),    id="linear of radius 0.9"),
    pytest.param(lambda: from_noise(linear(0.99)),   id="linear of radius 0.99"),
    pytest.param(lambda: from_noise(cosine()),       id="cosine"),
    pytest.param(lambda: from_noise(tanh_layer()),   id="tanh layer"),
    pytest.param(core,                               id="layer of a network"),
    pytest.param(trained_core,                       id="layer of a trained network"),
])  # fmt: skip
def test_every_solver_finds_the_known_solution(problem, solver):
    f, start, context, solution = problem()
    with torch.no_grad():
        found = solve(f, start, context, stopping=Tolerance(1e-5, 2000), solver=solver)
    assert found.status.tolist() == [Status.CONVERGED] * len(start)
    assert errors(found.value, solution).max() < 1e-3  # a residual of 1e-5 over 1 - 0.99
    assert torch.equal(found.residuals.isfinite().sum(0), found.iterations)


@every_solver
def test_the_residual_of_a_converged_value_is_within_the_tolerance(solver):
    f, start, _, _ = from_noise(linear(0.9))
    found = solve(f, start, stopping=Tolerance(1e-5, 2000), solver=solver)
    assert found.status.tolist() == [Status.CONVERGED] * 3
    assert (relative_residual(found.value, f(found.value, None)) < 2e-5).all()


@pytest.mark.parametrize(("radius", "size", "solver", "fewer"), [
    (0.9,  4,  Anderson(1),              2),
    (0.9,  4,  Anderson(2),              3),
    (0.9,  4,  Anderson(5),              6),
    (0.9,  4,  Anderson(5, damping=0.7), 6),
    (0.9,  4,  Broyden(8),               8),
    (0.99, 4,  Anderson(1),              15),
    (0.99, 4,  Anderson(2),              30),
    (0.99, 4,  Anderson(5),              50),
    (0.99, 4,  Broyden(8),               80),
    (0.99, 16, Anderson(5),              20),
], ids=str)  # fmt: skip
def test_acceleration_needs_far_fewer_evaluations(radius, size, solver, fewer):
    f, start, _, _ = from_noise(linear(radius, size))
    plain, found = (solve(f, start, stopping=Tolerance(1e-5, 5000), solver=one) for one in (Picard(), solver))
    assert found.status.tolist() == plain.status.tolist() == [Status.CONVERGED] * 3
    assert (found.iterations * fewer <= plain.iterations).all(), (found.iterations, plain.iterations)


def test_one_iteration_of_every_solver_is_the_plain_one():
    f, start, _, _ = from_noise(linear(0.9))
    for solver in (Anderson(3), Broyden(3)):
        torch.testing.assert_close(solve(f, start, stopping=FixedIterations(1), solver=solver).value, f(start, None))


@pytest.mark.parametrize(("dimension", "tolerance"), [
    pytest.param(1, 1e-7),
    pytest.param(2, 1e-7),
    pytest.param(3, 1e-6),
    pytest.param(2, 1e-11),
])  # fmt: skip
def test_anderson_with_memory_of_the_dimension_is_exact_after_one_more_evaluation(dimension, tolerance):
    f, start, _, solution = from_noise(linear(0.9, dimension, dtype=torch.float64))
    anderson = Anderson(dimension, regularisation=0.0)
    found = solve(f, start, stopping=FixedIterations(dimension + 1), solver=anderson).value
    torch.testing.assert_close(found, solution, rtol=tolerance, atol=tolerance)


def test_broyden_solves_a_linear_problem_in_twice_its_dimension():  # Gay 1979
    f, start, _, solution = from_noise(linear(0.99, 3, dtype=torch.float64))
    found = solve(f, start, stopping=FixedIterations(2 * 3), solver=Broyden(8)).value
    torch.testing.assert_close(found, solution, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", [
    Anderson(1), Anderson(2), Anderson(5), Anderson(8),
    Broyden(1), Broyden(2), Broyden(4), Broyden(8),
], ids=str)  # fmt: skip
def test_a_memory_that_is_too_short_costs_iterations_but_not_convergence(solver):
    for size in (4, 16) if solver == Broyden(1) else (4, 16, 64):
        f, start, _, _ = from_noise(linear(0.9, size))
        found = solve(f, start, stopping=Tolerance(1e-4, 300), solver=solver)
        assert found.status.tolist() == [Status.CONVERGED] * 3


@pytest.mark.parametrize("solver", SOLVERS[1:], ids=str)  # plain iteration needs far more
def test_iterations_beyond_the_solution_stay_there(solver):
    f, start, _, _ = from_noise(linear(0.99))
    with torch.no_grad():
        found = solve(f, start, stopping=FixedIterations(150), solver=solver)
    assert found.status.tolist() == [Status.COMPLETED] * 3
    assert found.residuals[100:].max() < 1e-3


@every_solver
def test_what_plain_iteration_cannot_solve(solver):
    # Near a solution that repels, a plain step moves away; the secants point back at it.
    f, z = lambda z, _: 3 * z + 1, torch.full((1, 1), -0.50001)
    found = solve(f, z, stopping=Tolerance(1e-6, 30), solver=solver)
    if isinstance(solver, Picard):
        assert found.status.item() == Status.DIVERGED
        assert torch.equal(found.value, f(z, None))  # the start was nearest
    else:
        assert found.status.item() == Status.CONVERGED
        assert found.value.item() == pytest.approx(-0.5, abs=1e-6)


# --- a trained layer: an iteration leaves 0.45 to 0.7 of its residual


@pytest.mark.parametrize(("solver", "most"), [
    (Picard(),                 100),
    (Picard(0.7),              60),
    (Anderson(1),              50),
    (Anderson(2),              36),
    (Anderson(5),              30),
    (Anderson(5, damping=0.7), 30),
    (Broyden(3),               36),
    (Broyden(8),               30),
], ids=str)  # fmt: skip
def test_a_trained_layer_is_solved_within_so_many_iterations(solver, most):
    f, start, context, solution = trained_core()
    found = solve(f, start, context, stopping=Tolerance(1e-5, most), solver=solver)
    assert found.status.tolist() == [Status.CONVERGED] * len(start)
    assert errors(found.value, solution).max() < 5e-5


@every_solver
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3, 1e-5])
def test_the_residual_of_a_trained_layers_value_is_within_the_tolerance(tolerance, solver):
    f, start, context, solution = trained_core()
    found = solve(f, start, context, stopping=Tolerance(tolerance, 200), solver=solver)
    assert found.status.tolist() == [Status.CONVERGED] * len(start)
    assert (relative_residual(found.value, f(found.value, context)) < tolerance).all()
    assert errors(found.value, solution).max() < 5 * tolerance


@every_accelerated
def test_acceleration_leaves_less_of_a_trained_layers_error_after_eight_iterations(solver):
    f, start, context, solution = trained_core()
    plain, found = (
        errors(solve(f, start, context, stopping=FixedIterations(8), solver=one).value, solution)
        for one in (Picard(), solver)
    )
    assert found.median() < 0.75 * plain.median() < 0.02


@every_solver
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-2), (torch.float32, 5e-6)], ids=str)
def test_a_trained_layer_is_solved_to_the_precision_of_its_type(dtype, most, solver):
    f, start, context, solution = trained_core(dtype)
    z, state, seen = start, solver.init(start), set()
    for _ in range(60):
        z, state = solver.step(z, f(z, context), state)
        mapped(lambda tensor: seen.add(tensor.dtype), state)
    assert z.dtype == dtype
    assert seen <= {torch.float32}
    found = solve(f, start, context, stopping=FixedIterations(60), solver=solver)
    assert torch.equal(found.value, z)
    assert found.status.tolist() == [Status.COMPLETED] * len(start)
    assert errors(z.float(), solution).max() < most


@every_solver
@pytest.mark.parametrize("feedback", [2.0, 5.0])
def test_a_trained_layer_that_no_longer_contracts_has_a_finite_value_and_says_so(feedback, solver):
    f, start, context = trained_layer(feedback=feedback)
    found = solve(f, start, context, stopping=Tolerance(1e-3, 100), solver=solver)
    reached = found.status == Status.CONVERGED
    assert found.value.isfinite().all()
    assert (found.status != Status.COMPLETED).all()
    # The residual that was read is that of the iterate before, which such a layer may increase.
    assert (relative_residual(found.value, f(found.value, context))[reached] < 2e-3).all()
    assert ((found.residuals <= 1e-3).any(0) == reached).all()
    if feedback == 5 or solver == Picard():
        assert not reached.any()
    elif solver in (Anderson(5), Anderson(5, damping=0.7), Broyden(8)):
        assert reached.float().mean() > 0.7  # where plain iteration only wanders


# --- other implementations


@pytest.mark.parametrize("problem", [linear(0.9, 6, torch.float64), tanh_layer()], ids=["linear", "tanh"])
@pytest.mark.parametrize("damping", [1.0, 0.7])
@pytest.mark.parametrize("memory", [1, 2, 3])
def test_anderson_makes_the_iterates_of_torchdeq(problem, memory, damping):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchdeq = pytest.importorskip("torchdeq.solver.anderson")
    # Its first step is a plain one even if damped, and its ridge is absolute.
    f, start, _, _ = from_noise((problem[0], problem[1].double()))
    f = problem[0] if problem[1].dtype == torch.float64 else lambda z, _: problem[0](z.float(), None).double()
    ours, theirs = Recorded(f), Recorded(lambda z, _: f(z, None))
    n = 6
    torchdeq.anderson_solver(
        lambda z: theirs(z, None), start, max_iter=n, tol=0.0, m=memory + 1, lam=1e-10, tau=damping
    )
    anderson = Anderson(memory, damping, regularisation=1e-12)
    if damping == 1:
        solve(ours, start, stopping=FixedIterations(n), solver=anderson)
    else:
        z, state = start, anderson.init(start)
        for k in range(n):
            fz = ours(z, None)
            following, state = anderson.step(z, fz, state)
            z = fz if k == 0 else following
    for one, other in zip(ours.inputs, theirs.inputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def scipy_inputs(method, f, start, n, **options):
    """Where a solver of scipy evaluates f(z) - z."""
    seen = []

    def g(x):
        seen.append(torch.from_numpy(x.copy()))
        z = seen[-1][None]
        return (f(z, None) - z)[0].numpy()

    with pytest.raises(optimize.NoConvergence):
        method(g, start.numpy(), alpha=1, line_search=None, maxiter=n - 1, f_tol=1e-300, **options)
    return seen


@pytest.mark.parametrize("problem", [
    pytest.param((lambda z, _: z.cos(), torch.full((5,), 0.7390851332151607, dtype=torch.float64)), id="cosine"),
    pytest.param(linear(0.9, 6, torch.float64),                                                     id="linear"),
    pytest.param((lambda z, _: (z @ spectral(1.4, 6).double().T).tanh() + 0.3 * z.sin() - 1,
                  torch.zeros(6, dtype=torch.float64)),                                             id="wild"),
])  # fmt: skip
def test_broyden_makes_the_iterates_of_scipy(problem):
    f, start, n = problem[0], normal(len(problem[1]), dtype=torch.float64), 6
    theirs, ours = scipy_inputs(optimize.broyden1, f, start, n), Recorded(f)
    solve(ours, start[None], stopping=FixedIterations(n), solver=Broyden(8))
    for one, other in zip(ours.inputs, theirs, strict=True):
        torch.testing.assert_close(one[0], other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory", [1, 2, 4])
def test_anderson_makes_the_iterates_of_scipy(memory):
    (f, _), start, n = linear(0.9, 6, torch.float64), normal(6, dtype=torch.float64), 6
    theirs, ours = scipy_inputs(optimize.anderson, f, start, n, M=memory, w0=0), Recorded(f)
    solve(ours, start[None], stopping=FixedIterations(n), solver=Anderson(memory, regularisation=0.0))
    for one, other in zip(ours.inputs, theirs, strict=True):
        torch.testing.assert_close(one[0], other, rtol=1e-5, atol=1e-5)


@every_solver
def test_the_solution_is_that_of_scipy(solver):
    matrix = torch.linalg.qr(spectral(1.0, 5).double()).Q * 0.9  # contracts by 0.9 in every direction
    f = lambda z, _: (z @ matrix.T + torch.arange(5.0).double()).sin()  # noqa: E731
    start = torch.zeros(5, dtype=torch.float64)
    theirs = optimize.fixed_point(
        lambda x: f(torch.from_numpy(x), None).numpy(), start.numpy(), xtol=1e-12, maxiter=2000, method="iteration"
    )
    found = solve(f, start[None], stopping=Tolerance(1e-7, 2000), solver=solver)
    assert found.status.item() == Status.CONVERGED
    torch.testing.assert_close(found.value[0], torch.from_numpy(theirs), rtol=1e-5, atol=1e-5)


# --- samples are independent


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-0.95, 0.95), min_size=3, max_size=3), min_size=2, max_size=4),
       st.sampled_from(SOLVERS), st.data())  # fmt: skip
def test_a_sample_has_the_iterates_it_has_alone(slopes, solver, data):
    order, slope = data.draw(st.permutations(range(len(slopes)))), torch.tensor(slopes)
    z, n = normal(*slope.shape), 6

    def solved(rows, stopping):
        return solve(sloped, z[rows], slope[rows], stopping=stopping, solver=solver, keep=range(1, n + 1))

    together, shuffled = (solved(rows, FixedIterations(n)) for rows in (list(range(len(slopes))), order))
    stopped, stopped_shuffled = (solved(rows, Tolerance(1e-3, 40)) for rows in (list(range(len(slopes))), order))
    for i in range(len(slopes)):
        j, alone, alone_stopped = order.index(i), solved([i], FixedIterations(n)), solved([i], Tolerance(1e-3, 40))
        for k in range(1, n + 1):
            torch.testing.assert_close(together.kept[k][i], alone.kept[k][0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(shuffled.kept[k][j], alone.kept[k][0], rtol=1e-4, atol=1e-4)
        for batch, row in ((stopped, i), (stopped_shuffled, j)):
            assert batch.iterations[row] == alone_stopped.iterations[0]
            assert batch.status[row] == alone_stopped.status[0]
            torch.testing.assert_close(batch.value[row], alone_stopped.value[0], rtol=1e-4, atol=1e-4)


@every_solver
@pytest.mark.parametrize("problem", [core, trained_core], ids=["random", "trained"])
def test_samples_of_the_layer_are_solved_as_if_alone(problem, solver):
    f, start, context, _ = problem()
    rule = {"stopping": Tolerance(1e-4, 50), "solver": solver}
    with torch.no_grad():
        together = solve(f, start, context, **rule)
        for i in range(len(start)):
            alone = solve(f, start[[i]], mapped(lambda tensor, i=i: tensor[[i]], context), **rule)
            torch.testing.assert_close(together.value[i], alone.value[0], rtol=1e-5, atol=1e-5)
            assert together.iterations[i] == alone.iterations[0]


# --- what breaks


@every_solver
def test_a_step_that_cannot_be_made_is_a_plain_one(solver):
    z, fz = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2.0, 2.0], [3.0, 4.0]])
    plain, state = z.lerp(fz, getattr(solver, "damping", 1.0)), solver.init(z)
    for _ in range(4):  # the same pair again and again; the second sample is at its fixed point
        following, state = solver.step(z, fz, state)
        torch.testing.assert_close(following, plain)


@pytest.mark.parametrize("solver", [*SOLVERS, Anderson(2, regularisation=0.0)], ids=str)
@pytest.mark.parametrize(("f", "solution"), [
    (lambda z, _: z,         [1.0, -2.0]),
    (lambda z, _: 0 * z + 3, [3.0, 3.0]),
    (lambda z, _: 0 * z,     [0.0, 0.0]),
], ids=["everywhere fixed", "constant", "zero"])  # fmt: skip
def test_problems_without_slopes_are_solved(f, solution, solver):
    z = torch.tensor([[1.0, -2.0]])
    for stopping in (Tolerance(1e-6, 50), FixedIterations(50)):
        found = solve(f, z, stopping=stopping, solver=solver)
        torch.testing.assert_close(found.value, torch.tensor([solution]), rtol=1e-5, atol=1e-5)
    zero_at_end = relative_residual(found.value, f(found.value, None)).item() < 1e-6
    damped = getattr(solver, "damping", 1.0) < 1
    assert zero_at_end or (solution == [0.0, 0.0] and damped)  # which only ever nears zero


SLOPES = torch.tensor([[0.9, -0.5, 0.3], [0.8, 0.1, -0.7], [-0.9, 0.6, 0.2]])


def breaking(value, at):
    """`sloped`, but its evaluation number `at` gives `value` where the context says so."""
    calls = []

    def f(z, context):
        slope, broken = context
        calls.append(None)
        return torch.where(broken if len(calls) == at else torch.zeros_like(broken), value, sloped(z, slope))

    return f


@every_solver
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_sample_that_breaks_comes_back_at_its_best_and_touches_no_other(solver, value, at):
    z, rule = normal(3, 3), {"stopping": Tolerance(1e-5, 200), "solver": solver}
    broken = torch.tensor([[False], [True], [False]])
    found = solve(breaking(value, at), z, (SLOPES, broken), **rule)
    others = solve(sloped, z[[0, 2]], SLOPES[[0, 2]], **rule)
    torch.testing.assert_close(found.value[[0, 2]], others.value, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.iterations[[0, 2]], others.iterations)
    assert found.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    assert found.iterations[1] == at  # and no more are spent

    seen = Recorded(sloped)
    residuals = solve(seen, z[[1]], SLOPES[[1]], stopping=FixedIterations(at - 1), solver=solver).residuals
    best = seen.outputs[residuals.argmin()] if at > 1 else z[[1]]
    torch.testing.assert_close(found.value[[1]], best)


def test_the_best_is_at_the_smallest_residual_and_not_near_it():
    outputs = iter([2.0, 2.2, 2.64, math.nan])  # residuals 1/2, 1/11, 1/6: the second is the smallest
    found = solve(lambda z, _: z * 0 + next(outputs), torch.ones(1, 1), stopping=Tolerance(1e-3, 9))
    assert found.value.item() == pytest.approx(2.2)


@every_accelerated
def test_a_step_that_overflows_is_a_plain_one(solver):
    z, state = torch.zeros(1, 2), solver.init(torch.zeros(1, 2))
    for fz in (1e30, 1.5e30):  # their products are beyond float32
        fz = torch.full_like(z, fz)
        plain = z.lerp(fz, getattr(solver, "damping", 1.0))
        z, state = solver.step(z, fz, state)
        torch.testing.assert_close(z, plain)


@every_solver
def test_a_broken_sample_is_rescued_after_a_fixed_number_too(solver):
    z, broken = normal(3, 3), torch.tensor([[False], [True], [False]])
    with torch.no_grad():
        found = solve(breaking(math.nan, 3), z, (SLOPES, broken), stopping=FixedIterations(6), solver=solver)
        others = solve(sloped, z[[0, 2]], SLOPES[[0, 2]], stopping=FixedIterations(6), solver=solver)
    assert found.status.tolist() == [Status.COMPLETED, Status.DIVERGED, Status.COMPLETED]
    assert found.value.isfinite().all()
    torch.testing.assert_close(found.value[[0, 2]], others.value, rtol=1e-5, atol=1e-5)


@every_solver
@pytest.mark.parametrize("breaks", [
    lambda z: z * z + 2, lambda z: 3 * z + 1e30, lambda z: 1e30 * z.sign(), lambda z: z.exp(), lambda z: z + 1e38,
], ids=["square", "large and growing", "large and flipping", "exponential", "near the largest float"])  # fmt: skip
def test_whatever_one_sample_does_nothing_raises_and_the_others_are_solved(breaks, solver):
    def f(z, broken):
        return torch.where(broken, breaks(z), (z @ matrix.T).tanh())

    matrix, z, broken = spectral(0.8), normal(3, 4) * 3, torch.tensor([[False], [True], [False]])
    for rule in (Tolerance(1e-5, 150), FixedIterations(30)):
        with torch.no_grad():
            found = solve(f, z, broken, stopping=rule, solver=solver)
            others = solve(f, z[[0, 2]], broken[[0, 2]], stopping=rule, solver=solver)
        assert found.value.isfinite().all()
        torch.testing.assert_close(found.value[[0, 2]], others.value, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.iterations[[0, 2]], others.iterations)
        assert torch.equal(found.status[[0, 2]], others.status)


@pytest.mark.parametrize("scale", [
    1e-15, 1e15,
    1e30,
    1e-30,
])  # fmt: skip
def test_a_residual_does_not_depend_on_the_scale(scale):
    z = torch.full((1, 2), scale)
    assert relative_residual(z, 2 * z).item() == pytest.approx(0.5)


@pytest.mark.parametrize("solver", [*SOLVERS, Anderson(3, regularisation=0.0)], ids=str)
def test_gradients_at_a_solution_are_finite(solver):
    slope = torch.tensor([[0.5, -0.2]], requires_grad=True)
    f = lambda z, slope: slope * (z - 1) + 1  # noqa: E731
    value = solve(f, torch.ones(1, 2), slope, stopping=FixedIterations(4), solver=solver).value
    assert torch.autograd.grad(value.sum(), slope)[0].isfinite().all()


# --- samples that are finished leave


class Inner(NamedTuple):
    slope: torch.Tensor
    nothing: None


class Outer(NamedTuple):
    shift: torch.Tensor
    inner: tuple[Inner, ...]


def nested(z, context):
    (inner,) = context.inner
    assert isinstance(context, Outer)
    assert isinstance(inner, Inner)
    assert len(z) == len(context.shift) == len(inner.slope)
    return inner.slope * z + context.shift


def as_context(slope):
    return Outer(torch.ones_like(slope), (Inner(slope, None),))


@every_solver
@pytest.mark.parametrize("stopping", [
    Tolerance(1e-3, 100), Tolerance(1e-3, (3, 50, 2)), FixedIterations((2, 0, 5)), FixedIterations([3, 3, 1]),
    FixedIterations((0, 0, 4)), FixedIterations((0, 0, 0)), FixedIterations(4),
], ids=str)  # fmt: skip
def test_only_what_is_counted_is_computed(stopping, solver):
    f, z = Counted(nested), normal(3, 3)
    found = solve(f, z, as_context(SLOPES), stopping=stopping, solver=solver)
    assert f.rows == found.iterations.sum()
    assert f.calls == found.iterations.max() == len(found.residuals)
    assert torch.equal(found.residuals.isfinite().sum(0), found.iterations)
    if isinstance(stopping, FixedIterations):
        wanted = [stopping.n] * 3 if isinstance(stopping.n, int) else list(stopping.n)
        assert found.iterations.tolist() == wanted
        assert found.status.tolist() == [Status.COMPLETED] * 3
        assert all(torch.equal(found.value[i], z[i]) for i in range(3) if wanted[i] == 0)


@every_solver
def test_counts_for_each_sample_give_each_its_own_iterate(solver):
    z, counts = normal(4, 3), (3, 0, 5, 1)
    slope = torch.cat([SLOPES, SLOPES[:1]])
    found = solve(nested, z, as_context(slope), stopping=FixedIterations(counts), solver=solver)
    for i, n in enumerate(counts):
        alone = solve(nested, z[[i]], as_context(slope[[i]]), stopping=FixedIterations(n), solver=solver)
        torch.testing.assert_close(found.value[i], alone.value[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.residuals[:n, i], alone.residuals[:, 0], rtol=1e-4, atol=1e-6)
        assert found.residuals[n:, i].isnan().all()


@every_solver
def test_kept_iterates_are_of_the_whole_batch(solver):
    z, counts = normal(3, 3), (3, 0, 2)
    found = solve(sloped, z, SLOPES, stopping=FixedIterations(counts), solver=solver, keep=(1, 2, 3, 4))
    assert found.kept.keys() == {1, 2, 3}
    for k, kept in found.kept.items():
        wanted = solve(sloped, z, SLOPES, stopping=FixedIterations([min(k, n) for n in counts]), solver=solver)
        torch.testing.assert_close(kept, wanted.value, rtol=1e-5, atol=1e-5)


def test_limits_for_each_sample_are_told_for_each():
    slope = torch.tensor([[0.5], [0.5], [0.99]])
    found = solve(sloped, torch.zeros(3, 1), slope, stopping=Tolerance(1e-3, (2, 40, 7)))
    assert found.status.tolist() == [Status.ITERATION_LIMIT, Status.CONVERGED, Status.ITERATION_LIMIT]
    assert found.iterations.tolist() == [2, 10, 7]


@pytest.mark.parametrize("counts", [(1, 2), (1, 2, 3, 4), ()])
@pytest.mark.parametrize("rule", [FixedIterations, lambda counts: Tolerance(1e-3, counts)], ids=["fixed", "tolerance"])
def test_a_wrong_number_of_limits_is_named(rule, counts):
    with pytest.raises(ValueError, match=rf"{len(counts)} limits of iterations for 3 samples"):
        solve(halving, torch.zeros(3, 1), stopping=rule(counts))


@pytest.mark.parametrize("counts", [5, (), (5, 5)])
def test_an_empty_batch_has_an_empty_solution(counts):
    batch = len(counts) if isinstance(counts, tuple) else 0
    for solver in SOLVERS:
        found = solve(halving, torch.zeros(batch, 3), stopping=FixedIterations(counts), solver=solver)
        assert found.value.shape == (batch, 3)
        assert found.iterations.shape == found.status.shape == (batch,)


@every_solver
def test_gradients_of_counts_for_each_sample_are_those_of_the_samples_alone(solver):
    start, counts = normal(3, 3, dtype=torch.float64), (3, 0, 4)

    def gradients(rows, stopping):
        z, slope = start[rows].requires_grad_(), SLOPES[rows].double().requires_grad_()
        shift = torch.ones(1, dtype=torch.float64, requires_grad=True)
        value = solve(lambda z, slope: slope * z + shift, z, slope, stopping=stopping, solver=solver).value
        return torch.autograd.grad(value.square().sum(), (z, slope, shift), materialize_grads=True)

    together = gradients([0, 1, 2], FixedIterations(counts))
    alone = [gradients([i], FixedIterations(n)) for i, n in enumerate(counts)]
    assert together[0][0].abs().min() > 0
    for k, join in enumerate((torch.cat, torch.cat, sum)):
        torch.testing.assert_close(together[k], join([gradient[k] for gradient in alone]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [Picard(0.7), Anderson(3, 0.7, 1e-2), Broyden(8)], ids=str)
def test_the_gradient_of_a_solver_is_that_of_its_difference_quotient(solver):
    start = normal(1, 3, dtype=torch.float64)
    # Weights of Anderson in float32 make the difference quotient rough.
    tolerance = {"eps": 1e-3, "atol": 1e-2, "rtol": 1e-2}

    def value(slope):
        return solve(sloped, start, slope, stopping=FixedIterations(3), solver=solver).value

    assert torch.autograd.gradcheck(value, SLOPES[:1].double().requires_grad_(), **tolerance)


@every_solver
@pytest.mark.parametrize("n", [3, (0, 3)])
def test_no_solver_waits_for_the_device(n, solver):
    z = torch.empty(2, 3, device="meta")
    assert solve(halving, z, stopping=FixedIterations(n), solver=solver).value.device.type == "meta"


# --- precision


@every_accelerated
@pytest.mark.parametrize(("dtype", "kept"), [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32),
    (torch.float64, torch.float64),
])  # fmt: skip
def test_histories_are_kept_in_float32_at_least(dtype, kept, solver):
    z, seen = normal(2, 4).to(dtype), set()
    state = solver.init(z)
    for _ in range(4):
        fz = halving(z)
        z, state = solver.step(z, fz, state)
        assert z.dtype == dtype
    mapped(lambda tensor: seen.add(tensor.dtype), state)
    assert seen == {kept}


@every_solver
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_value_has_the_type_of_f(dtype, solver):
    f, _ = tanh_layer()
    z = normal(3, 4).to(dtype)
    for stopping in (Tolerance(1e-2, 50), FixedIterations(8), FixedIterations((2, 0, 6))):
        found = solve(lambda z, _: f(z.float(), None).to(z.dtype), z, stopping=stopping, solver=solver)
        assert found.value.dtype == dtype
        assert found.value.isfinite().all()
        assert found.residuals.dtype == torch.float32


@every_solver
def test_the_value_has_the_type_of_f_where_the_start_has_another(solver):
    # As under autocast: the start is float32 and every f(z) bfloat16.
    found = solve(lambda z, _: halving(z).bfloat16(), torch.zeros(1, 2), stopping=Tolerance(1e-2, 9), solver=solver)
    assert found.value.dtype == torch.bfloat16


@every_accelerated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_beyond_the_range_of_the_type_is_a_plain_one(dtype, solver):
    # The secant of these two pairs ends near 1.8e6, beyond float16, whose largest value is 65504.
    state, z = None, torch.tensor([[0.0, 0.0]], dtype=dtype)
    state = solver.init(z)
    for fz in (30000.0, 59500.0):
        z, state = solver.step(z, torch.full_like(z, fz), state)
    assert z.isfinite().all()


@pytest.mark.parametrize("solver", [Anderson(1), Anderson(2), Anderson(5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("problem", [linear(0.9), linear(0.99), linear(0.9, 16), tanh_layer()],
                         ids=["0.9", "0.99", "0.9 of 16", "tanh"])  # fmt: skip
def test_anderson_is_no_worse_than_plain_iteration_in_half_precision(problem, dtype, solver):
    f, solution = problem
    z = normal(8, len(solution)).to(dtype)

    def error(solver):
        found = solve(lambda z, _: f(z.float(), None).to(dtype), z, stopping=FixedIterations(40), solver=solver)
        return ((found.value.float() - solution).norm(dim=1) / solution.norm()).mean()

    assert error(solver) <= error(Picard()) + torch.finfo(dtype).eps / 4


# --- parameters


@pytest.mark.parametrize(("make", "said"), [
    (lambda: Anderson(0),                            "memory is 0; .* at least 1"),
    (lambda: Anderson(-2),                           "memory is -2"),
    (lambda: Anderson(2.0),                          "memory is 2.0; it must be an integer"),
    (lambda: Broyden(0),                             "memory is 0; .* at least 1"),
    (lambda: Broyden(1.5),                           "memory is 1.5; it must be an integer"),
    (lambda: Anderson(damping=0),                    "damping is 0; .* 1 is the plain"),
    (lambda: Anderson(damping=1.01),                 "damping is 1.01"),
    (lambda: Anderson(damping=-1),                   "damping is -1"),
    (lambda: Anderson(damping=math.nan),             "damping is nan"),
    (lambda: Anderson(regularisation=-1e-9),         "regularisation is -1e-09; .* at least 0"),
    (lambda: Anderson(regularisation=math.nan),      "regularisation is nan"),
    (lambda: Anderson(regularisation=math.inf),      "regularisation is inf"),
    (lambda: FixedIterations((1, -1)),               "not -1"),
    (lambda: FixedIterations([2, 1.5]),              "not 1.5"),
    (lambda: FixedIterations("many"),                "not 'm'"),
    (lambda: FixedIterations(None),                  "not None"),
    (lambda: Tolerance(1e-3, (4, 0)),                "max_iterations must be an integer of at least 1.* not 0"),
])  # fmt: skip
def test_bad_parameters_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@every_solver
def test_solvers_of_equal_parameters_are_equal(solver):
    assert eval(repr(solver)) == solver
    assert len({solver, eval(repr(solver))}) == 1
