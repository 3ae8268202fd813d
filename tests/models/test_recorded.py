"""Recorded calls are the calls that were made: by a tape that does to memory what a CUDA graph does, and on a GPU by
graphs."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fpdm import Anderson, DiT, FixedIterations, FixedPointDiT, Picard, Solve, Tolerance, to_float8
from fpdm.fixedpoint import running
from fpdm.models.float8 import float8_missing
from fpdm.models.recorded import KEPT, Recorder, cuda_graph
from tests.networks import randomised

HAS_GPU = torch.cuda.is_available()


class Tape(TorchDispatchMode):
    """Kernels with the places in memory that they read and write, to be run again: whatever Python did between them is
    not on it, and nothing may ask for a value."""

    def __init__(self, device, work):
        super().__init__()
        self.kernels = []
        with self:
            work()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read within a recording"
        made = function(*args, **(kwargs or {}))
        self.kernels.append((function, args, kwargs or {}, made))
        return made

    def __call__(self):
        with torch.no_grad():
            for function, args, kwargs, made in self.kernels:
                again = function(*args, **kwargs)
                outputs = zip(made, again, strict=True) if isinstance(made, tuple | list) else [(made, again)]
                for place, value in outputs:
                    if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                        place.copy_(value)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="there is no GPU"))])
def place(request, monkeypatch):
    """A device, and how it records. What a CPU is asked at once a GPU is not: nor is the tape."""
    if request.param == "cpu":
        monkeypatch.setattr(running, "known", lambda mask: False)
        monkeypatch.setattr(running, "_norm", lambda v: torch.linalg.vector_norm(v.flatten(1).double(), dim=1))
    return request.param, Tape if request.param == "cpu" else cuda_graph


def network(kind=FixedPointDiT, seed=0, **settings):
    settings = {"sample_size": 8, "in_channels": 1, "hidden_size": 32, "num_heads": 4, "num_classes": 3, **settings}
    model = randomised(kind(**settings))
    for parameter in model.parameters() if seed else ():
        parameter.data.mul_(0.9)
    return model


def inputs(device, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, t, y = torch.randn(batch, 1, 8, 8, generator=g), 900 * torch.rand(batch, generator=g), torch.arange(batch) % 3
    return x.to(device), t.to(device), y.to(device)


def pair(place, kind=FixedPointDiT, **settings):
    """A network, and the same one recorded."""
    device, capture = place
    plain = network(kind, **settings).to(device)
    recorded = copy.deepcopy(plain)
    recorded._recorder = Recorder(device, capture)
    return plain, recorded


def same(found, expected):
    torch.testing.assert_close(found.sample, expected.sample, rtol=1e-5, atol=1e-5)
    assert (found.solution is None) == (expected.solution is None)
    if expected.solution is not None:
        for name in ("value", "residuals", "iterations", "status"):
            torch.testing.assert_close(getattr(found.solution, name), getattr(expected.solution, name), equal_nan=True)


def recordings(model):
    return len(model._recorder.sets)


@pytest.mark.parametrize(
    "settings", [{}, {"num_core": 2, "input_skip": True, "time_in_pre_post": True}, {"injection": "gate"}]
)
@torch.no_grad()
def test_one_set_serves_all_timesteps_iterations_and_starts_of_a_batch(settings, place):
    plain, recorded = pair(place, **settings)
    init = torch.randn(3, 16, 32, device=place[0])
    for seed, (iterations, start) in enumerate([(4, None), (1, None), (7, init), (2, None), (4, init)]):
        given = inputs(place[0], seed=seed)
        same(recorded(*given, iterations=iterations, init=start), plain(*given, iterations=iterations, init=start))
    x, _, _ = inputs(place[0])
    same(recorded(x, 300, iterations=2), plain(x, 300, iterations=2))  # one timestep, no class
    assert recordings(recorded) == 1


@torch.no_grad()
def test_what_was_returned_is_not_written_to_by_later_calls(place):
    _, recorded = pair(place)
    first = recorded(*inputs(place[0]), iterations=3)
    kept = copy.deepcopy((first.sample, first.solution))
    recorded(*inputs(place[0], seed=1), iterations=5)
    assert torch.equal(first.sample, kept[0])
    assert torch.equal(first.solution.value, kept[1].value)
    assert torch.equal(first.solution.residuals, kept[1].residuals)


@torch.no_grad()
def test_broken_samples_end_as_they_do_alone_and_break_no_later_call(place):
    plain, recorded = pair(place)
    good, broken = inputs(place[0]), inputs(place[0])
    broken[0][1] = torch.nan
    for given in (broken, good, broken):
        found, expected = recorded(*given, iterations=3), plain(*given, iterations=3)
        assert found.solution.status.tolist() == expected.solution.status.tolist()
        torch.testing.assert_close(found.sample, expected.sample, equal_nan=True)


@torch.no_grad()
def test_samples_that_diverge_keep_their_best_iterate(place):
    plain, recorded = pair(place)
    for model in (plain, recorded):
        model.core.blocks[0].mlp.fc2.weight.mul_(20)
        model.core.inject_z.weight.mul_(20)
    found, expected = (model(*inputs(place[0]), iterations=12) for model in (recorded, plain))
    assert set(expected.solution.status.tolist()) == {running.Status.DIVERGED}
    same(found, expected)


@pytest.mark.parametrize("damping", [1.0, 0.5])
@torch.no_grad()
def test_damping_is_recorded_apart(damping, place):
    plain, recorded = pair(place)
    recorded(*inputs(place[0]), iterations=2)
    solve = Solve(stopping=FixedIterations(4), solver=Picard(damping))
    same(recorded(*inputs(place[0]), solve=solve), plain(*inputs(place[0]), solve=solve))
    assert recordings(recorded) == (1 if damping == 1 else 2)


@pytest.mark.parametrize(
    "solve",
    [
        Solve(stopping=Tolerance(0.1, 6)),
        Solve(stopping=FixedIterations((1, 4, 2))),
        Solve(stopping=FixedIterations(0)),
        Solve(stopping=FixedIterations(4), solver=Anderson(2)),
        Solve(stopping=FixedIterations(4), exits=(2,)),
    ],
)
@torch.no_grad()
def test_what_cannot_be_recorded_is_done_without(solve, place):
    plain, recorded = pair(place)
    found, expected = (model(*inputs(place[0]), solve=solve) for model in (recorded, plain))
    same(found, expected)
    assert found.exits.keys() == expected.exits.keys()
    assert recordings(recorded) == 0


@torch.no_grad()
def test_autocast_is_not_recorded(place):
    plain, recorded = pair(place)
    with torch.autocast(place[0], torch.bfloat16):
        same(recorded(*inputs(place[0]), iterations=2), plain(*inputs(place[0]), iterations=2))
    assert recordings(recorded) == 0


def test_gradients_are_not_recorded(place):
    plain, recorded = pair(place)
    for model in (plain, recorded):
        model(*inputs(place[0]), iterations=2).sample.square().sum().backward()
    for own, other in zip(recorded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    assert recordings(recorded) == 0


@torch.no_grad()
def test_an_explicit_network_is_one_recording(place):
    plain, recorded = pair(place, DiT, depth=3)
    for seed in range(3):
        same(recorded(*inputs(place[0], seed=seed)), plain(*inputs(place[0], seed=seed)))
    assert recordings(recorded) == 1
    with pytest.raises(ValueError, match="no iterations"):
        recorded(*inputs(place[0]), iterations=2)


@torch.no_grad()
def test_the_sizes_used_last_are_kept(place):
    plain, recorded = pair(place)
    for batch in (1, 2, 3, 4, 5, 1, 5, 2):
        given = inputs(place[0], batch)
        same(recorded(*given, iterations=2), plain(*given, iterations=2))
        assert recordings(recorded) <= KEPT


@torch.no_grad()
def test_weights_may_change_in_place_or_be_replaced(place):
    _, recorded = pair(place)
    other, given = network(seed=1).to(place[0]), inputs(place[0])
    recorded(*given, iterations=3)
    recorded.load_state_dict(other.state_dict())
    same(recorded(*given, iterations=3), other(*given, iterations=3))
    assert recordings(recorded) == 1
    recorded.double()
    found = recorded(given[0].double(), *given[1:], iterations=3).sample
    torch.testing.assert_close(found.float(), other(*given, iterations=3).sample, rtol=1e-4, atol=1e-4)
    assert recordings(recorded) == 2


def test_calls_in_inference_mode_and_out_of_it_share_a_recording(place):
    plain, recorded = pair(place)
    given = inputs(place[0])
    with torch.inference_mode():
        recorded(*given, iterations=2)
    with torch.no_grad():
        same(recorded(*given, iterations=2), plain(*given, iterations=2))
    assert recordings(recorded) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_record_for_themselves(copied, place):
    plain, recorded = pair(place)
    recorded(*inputs(place[0]), iterations=2)
    other = copied(recorded)
    assert recordings(other) == 0
    same(other(*inputs(place[0]), iterations=3), plain(*inputs(place[0]), iterations=3))
    assert recordings(other) == recordings(recorded) == 1


@torch.no_grad()
def test_an_init_of_another_shape_is_refused_and_the_next_call_is_right(place):
    plain, recorded = pair(place)
    with pytest.raises(ValueError, match="init has shape"):
        recorded(*inputs(place[0]), iterations=2, init=torch.zeros(2, 16, 32, device=place[0]))
    same(recorded(*inputs(place[0]), iterations=2), plain(*inputs(place[0]), iterations=2))


@pytest.mark.skipif(bool(float8_missing("cpu")), reason=float8_missing("cpu") or "-")
@torch.no_grad()
def test_layers_in_float8_are_recorded(place):
    plain, recorded = pair(place)
    to_float8(plain), to_float8(recorded)
    same(recorded(*inputs(place[0]), iterations=3), plain(*inputs(place[0]), iterations=3))


def test_a_cpu_has_no_graphs():
    with pytest.raises(ValueError, match="for networks on a GPU; this one is on cpu"):
        network().enable_cuda_graphs()


@pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
@torch.no_grad()
def test_a_network_on_a_gpu_is_recorded_once_asked_and_not_after():
    model = network().cuda()
    expected = model(*inputs("cuda"), iterations=3)
    model.enable_cuda_graphs()
    same(model(*inputs("cuda"), iterations=3), expected)
    assert recordings(model) == 1
    model.disable_cuda_graphs()
    same(model(*inputs("cuda"), iterations=3), expected)
