"""The loop against problems whose solution is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpdm.fixedpoint import FixedIterations, Picard, Solution, Status, Tolerance, relative_residual, solve
from tests.fixedpoint.problems import Counted, cosine, halving, linear, overshooting, sloped, tanh_layer


@pytest.mark.parametrize("damping", [1.0, 0.7, 0.3])
@pytest.mark.parametrize("problem", [
    pytest.param(linear(0.3),   id="linear of radius 0.3"),
    pytest.param(linear(0.9),   id="linear of radius 0.9"),
    pytest.param(cosine(),      id="cosine"),
    pytest.param(tanh_layer(),  id="tanh layer"),
])  # fmt: skip
def test_picard_finds_the_known_solution(problem, damping):
    f, solution = problem
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    found = solve(f, start, stopping=Tolerance(1e-6, 500), solver=Picard(damping))
    assert found.status.tolist() == [Status.CONVERGED] * 3
    torch.testing.assert_close(found.value, solution.expand(3, 4), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("damping", "solved"), [(1.0, False), (0.8, False), (0.7, True), (0.5, True)])
def test_damping_solves_what_the_plain_iteration_cannot(damping, solved):
    f, solution = overshooting()  # contracts where |1 - 2.5 damping| < 1
    found = solve(f, torch.zeros(1, 4), stopping=Tolerance(1e-6, 100), solver=Picard(damping))
    assert (found.status.item() == Status.CONVERGED) == solved
    assert torch.allclose(found.value, solution, atol=1e-5) == solved


@settings(deadline=None)
@given(slope=st.floats(-1.5, 1.5), damping=st.floats(0.05, 1), start=st.floats(-5, 5), n=st.integers(0, 20))
def test_every_iterate_of_a_line_is_the_closed_form(slope, damping, start, n):
    # z_n - 1 = (1 - damping (1 - slope))^n (z_0 - 1) for f(z) = slope z + (1 - slope)
    f, z = lambda z, _: slope * z + (1 - slope), torch.full((1, 1), start, dtype=torch.float64)
    found = solve(f, z, stopping=FixedIterations(n), solver=Picard(damping), record=False)
    assert found.value.item() == pytest.approx(1 + (1 - damping * (1 - slope)) ** n * (start - 1), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("damping", [1.0, 0.5])
@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_fixed_iterations_evaluate_exactly_n_times(n, record, damping):
    f, z = Counted(halving), torch.zeros(3, 2)
    found = solve(f, z, stopping=FixedIterations(n), solver=Picard(damping), record=record)
    assert f.calls == n
    assert found.iterations.tolist() == [n] * 3
    assert found.status.tolist() == [Status.COMPLETED] * 3
    assert found.residuals.shape == (n, 3)
    assert found.residuals.isfinite().all() == (record or n == 0)


def test_no_iterations_return_the_start():
    z = torch.randn(2, 3)
    found = solve(halving, z, stopping=FixedIterations(0))
    assert torch.equal(found.value, z)
    assert (found.residuals.shape, found.residuals.dtype) == ((0, 2), torch.float32)


def test_the_start_is_left_alone():
    z = torch.zeros(2, 3)
    solve(halving, z, stopping=Tolerance(1e-3, 9), solver=Picard(0.5))
    assert torch.equal(z, torch.zeros(2, 3))


@pytest.mark.parametrize("n", [0, 1, 5])
def test_fixed_iterations_never_wait_for_the_device(n):
    # Tensors on the meta device have no values, so that .item(), bool() and their like raise.
    z = torch.empty(2, 3, device="meta")
    found = solve(halving, z, stopping=FixedIterations(n), solver=Picard(0.5), record=True)
    assert {t.device.type for t in (found.value, found.residuals, found.iterations, found.status)} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):  # what a wait looks like
        solve(halving, z, stopping=Tolerance(0.1, 3))


def test_counts_may_be_numpys():
    z = torch.tensor([[4.0], [2.0]])
    found = solve(halving, z, stopping=FixedIterations(np.int64(3)))
    assert torch.equal(found.value, solve(halving, z, stopping=FixedIterations(3)).value)


def test_residuals_are_relative_and_per_sample():
    found = solve(halving, torch.tensor([[0.0], [4.0]]), stopping=FixedIterations(3))
    torch.testing.assert_close(found.residuals, torch.tensor([[1, 1 / 3], [1 / 3, 1 / 5], [1 / 7, 1 / 9]]))
    assert found.residuals.dtype == torch.float32


def test_a_residual_is_a_norm_over_all_but_the_batch():
    z, fz = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    z[0], fz[0] = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[3.0, 1.0], [4.0, 0.0]])
    torch.testing.assert_close(relative_residual(z, fz), torch.tensor([5 / math.sqrt(26), 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_residuals_are_measured_in_float32(dtype):
    # The squares of 4096 values of 300 sum to far more than float16 holds.
    z = torch.full((1, 4096), 200.0, dtype=dtype)
    residual = relative_residual(z, torch.full_like(z, 300.0))
    assert residual.dtype == torch.float32
    assert residual.item() == pytest.approx(1 / 3, rel=1e-6)


def test_a_residual_is_a_measurement_without_gradient():
    z = torch.zeros(1, 1, requires_grad=True)
    assert not solve(halving, z, stopping=FixedIterations(2)).residuals.requires_grad


def test_each_sample_stops_on_its_own():
    f = Counted(halving)
    found = solve(f, torch.tensor([[0.0], [4.0]]), stopping=Tolerance(0.25, 10))
    assert found.value.flatten().tolist() == [1.75, 2.5]
    assert found.iterations.tolist() == [3, 2]
    assert found.status.tolist() == [Status.CONVERGED] * 2
    torch.testing.assert_close(
        found.residuals, torch.tensor([[1, 1 / 3], [1 / 3, 1 / 5], [1 / 7, math.nan]]), equal_nan=True
    )
    assert f.calls == 3  # and not ten


def test_the_iteration_limit_is_told_per_sample():
    found = solve(halving, torch.tensor([[0.0], [4.0]]), stopping=Tolerance(0.25, 2))
    assert found.status.tolist() == [Status.ITERATION_LIMIT, Status.CONVERGED]
    assert found.value.flatten().tolist() == [1.5, 2.5]


SLOPES = [0.0, 0.1, 0.5, -0.5, 0.9, 0.99, 1e12]  # one iteration to converge, ever more, never, diverging


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SLOPES), min_size=1, max_size=5), st.sampled_from([1.0, 0.6]), st.data())
def test_a_sample_is_solved_as_if_alone_wherever_it_stands(slopes, damping, data):
    order = data.draw(st.permutations(range(len(slopes))))
    rule = {"stopping": Tolerance(1e-3, 40), "solver": Picard(damping)}
    slope = torch.tensor(slopes)[:, None]
    z = slope + 1
    together = solve(sloped, z, slope, **rule)
    shuffled = solve(sloped, z[order], slope[order], **rule)
    for i in range(len(slopes)):
        alone, j = solve(sloped, z[i : i + 1], slope[i : i + 1], **rule), order.index(i)
        for batch, row in ((together, i), (shuffled, j)):
            assert torch.equal(batch.value[row], alone.value[0])
            assert batch.iterations[row] == alone.iterations[0]
            assert batch.status[row] == alone.status[0]
            spent = len(alone.residuals)
            assert torch.equal(batch.residuals[:spent, row].nan_to_num(-1), alone.residuals[:, 0].nan_to_num(-1))
            assert batch.residuals[spent:, row].isnan().all()


@pytest.mark.parametrize("breaks", [lambda z: z * z, lambda z: -z.log(), lambda z: z / 0], ids=["grows", "nan", "inf"])
def test_a_diverging_sample_is_told_and_leaves_the_others_unchanged(breaks):
    def f(z, broken):
        return torch.where(broken, breaks(z), halving(z))

    z, broken = torch.tensor([[0.0], [10.0], [4.0]]), torch.tensor([[False], [True], [False]])
    found = solve(f, z, broken, stopping=Tolerance(1e-4, 100))
    assert found.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    assert found.value.isfinite().all()
    others = solve(halving, z[[0, 2]], stopping=Tolerance(1e-4, 100))
    assert torch.equal(found.value[[0, 2]], others.value)
    assert torch.equal(found.iterations[[0, 2]], others.iterations)


def test_the_value_of_a_diverging_sample_is_the_last_finite_one():
    found = solve(lambda z, _: 2 - z.log(), torch.tensor([[math.e**3]]), stopping=Tolerance(1e-4, 100))
    assert found.value.item() == pytest.approx(-1)  # whose logarithm is not a number
    assert found.iterations.item() == 2


def test_divergence_is_told_for_fixed_iterations_too():
    found = solve(lambda z, _: z.log(), torch.tensor([[-1.0], [1e30]]), stopping=FixedIterations(2))
    assert found.status.tolist() == [Status.DIVERGED, Status.COMPLETED]


@pytest.mark.parametrize("start", [1.0, 10.0, 1e4])
def test_a_solution_at_zero_is_no_divergence(start):
    found = solve(lambda z, _: 0 * z, torch.full((1, 1), start), stopping=Tolerance(1e-3, 5))
    assert (found.value.item(), found.status.item()) == (0, Status.CONVERGED)


@pytest.mark.parametrize("status", Status)
def test_every_status_has_its_own_message(status):
    assert len(status.message) > 20
    assert [s.message for s in Status].count(status.message) == 1


@pytest.mark.parametrize(("make", "said"), [
    (lambda: Picard(0),                     "damping is 0"),
    (lambda: Picard(-0.5),                  "damping is -0.5"),
    (lambda: Picard(1.5),                   "damping is 1.5"),
    (lambda: Picard(math.nan),              "damping is nan"),
    (lambda: FixedIterations(-1),           "not -1"),
    (lambda: FixedIterations(1.5),          "not 1.5"),
    (lambda: Tolerance(0, 5),               "tolerance is 0"),
    (lambda: Tolerance(-1e-3, 5),           "tolerance is -0.001"),
    (lambda: Tolerance(math.nan, 5),        "tolerance is nan"),
    (lambda: Tolerance(1e-3, 0),            "max_iterations must be an integer of at least 1.* not 0"),
    (lambda: Tolerance(1e-3, 2.5),          "max_iterations must be .* not 2.5"),
])  # fmt: skip
def test_bad_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_keep_gives_the_iterates_asked_for():
    found = solve(halving, torch.zeros(1, 1), stopping=FixedIterations(4), keep=(1, 3))
    assert {k: z.item() for k, z in found.kept.items()} == {1: 1.0, 3: 1.75}


def test_kept_iterates_of_a_stopped_sample_are_its_value():
    found = solve(halving, torch.tensor([[0.0], [4.0]]), stopping=Tolerance(0.25, 10), keep=(2, 3, 4))
    assert {k: z.flatten().tolist() for k, z in found.kept.items()} == {2: [1.5, 2.5], 3: [1.75, 2.5]}


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 5))
def test_one_solve_then_another_is_the_long_one(n, m):
    z, keep = torch.tensor([[0.0], [4.0]]), range(1, n + m + 1)
    first = solve(halving, z, stopping=FixedIterations(n), keep=keep)
    second = solve(halving, first.value, stopping=FixedIterations(m), keep=[k - n for k in keep])
    joined, whole = first.then(second), solve(halving, z, stopping=FixedIterations(n + m), keep=keep)
    for name in ("value", "residuals", "iterations", "status"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert joined.kept.keys() == whole.kept.keys()
    assert all(torch.equal(joined.kept[k], whole.kept[k]) for k in keep)


def test_the_context_reaches_f_as_it_is():
    context, seen = (torch.ones(1), None), []
    solve(lambda z, c: seen.append(c) or z, torch.zeros(1, 1), context, stopping=FixedIterations(2))
    assert [c is context for c in seen] == [True, True]


def test_a_solver_keeps_its_state_between_steps():
    class Averaging:
        """The mean of all f(z) so far: what it needs from the past travels in its state."""

        def init(self, z):
            return torch.zeros_like(z), 0

        def step(self, z, fz, state):
            total, count = state[0] + fz, state[1] + 1
            return total / count, (total, count)

    found = solve(halving, torch.zeros(1, 1), stopping=FixedIterations(3), solver=Averaging())
    assert isinstance(found, Solution)
    assert found.value.item() == pytest.approx((1 + 1.5 + 1.625) / 3)
